"""The package as people install it: the wheel holds all that the built-in model needs, with a compiler or without."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import clean_environment

from pixtral_cli.model import native_library

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "completions", "pixtral_cli", "weights_cache")


def pip(*arguments, **environment):
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=250, env=os.environ | environment)


def copied(folder, name):
    """A file or folder of ours in `folder`, without what was compiled here before."""
    if (ROOT / name).is_dir():
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    else:
        shutil.copy(ROOT / name, folder / name)


def install(folder, **environment):
    """Where the wheel, built from a copy so that no older build helps, is installed on its own."""
    (folder / "source").mkdir()
    for name in SOURCES:
        copied(folder / "source", name)
    pip("wheel", folder / "source", "--no-deps", "--wheel-dir", folder, **environment)
    pip("install", "--no-deps", "--target", folder / "site", *folder.glob("*.whl"))
    return folder / "site"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return install(tmp_path_factory.mktemp("installed"))


def answer(site, *flags):
    """What the installed program says of a picture, as it prints it, and on standard error."""
    asked = ["run", "--model-path", "tiny", "-i", ROOT / "examples" / "shapes.png", "-p", "How many shapes?", *flags]
    return subprocess.run(
        [site / "bin" / "pixtral", *asked], env=clean_environment(PYTHONPATH=str(site)), cwd=site,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def test_the_installed_wheel_answers_from_anywhere(installed, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = clean_environment(PYTHONPATH=str(installed))
    where = "import pixtral_cli, weights_cache; print(pixtral_cli.__file__, weights_cache.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.split() == [str(installed / name / "__init__.py") for name in ("pixtral_cli", "weights_cache")]
    share = installed / "share"
    shells = ("bash-completion/completions/pixtral.bash", "zsh/site-functions/_pixtral", "fish/vendor_completions.d")
    assert all((share / name).exists() for name in shells)
    assert (installed / "pixtral_cli/tiny/evaluate.py").exists()
    assert not (installed / "pixtral_cli/tiny/training").exists()
    done = answer(installed)
    assert done.stdout.strip() and done.stderr == ""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_with_a_compiler_the_kernels_are_compiled_and_their_sources_stay_out(installed):
    kernels = installed / "pixtral_cli" / "model" / "kernels"
    assert [path.name for path in kernels.glob("_native*")] == ["_native.abi3.so"]
    assert not [*installed.rglob("*.c"), *installed.rglob("*.h")] and (kernels / "packed_matmul.cu").exists()
    found = json.loads(answer(installed, "--json").stdout)["kernels"]
    assert found.split()[0] in native_library.INSTRUCTIONS


@pytest.mark.slow
def test_without_a_compiler_it_installs_answers_the_same_and_says_what_is_missing(installed, tmp_path):
    bare = install(tmp_path, CC="/bin/false")
    assert not [*bare.rglob("*.so")]
    flags = ("--quantization-encoding", "q4_0", "--json")
    fast, slow = answer(installed, *flags), answer(bare, *flags)
    assert json.loads(slow.stdout)["text"] == json.loads(fast.stdout)["text"]
    assert json.loads(slow.stdout)["kernels"].startswith("torch's") and "C compiler" in slow.stderr
    assert fast.stderr == ""
