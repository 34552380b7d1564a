"""The package as people install it: the wheel holds all that the built-in model needs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import clean_environment

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "completions", "pixtral_cli", "weights_cache")


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], check=True, capture_output=True, timeout=250)


@pytest.fixture
def installed(tmp_path):
    """Where the wheel, built from a copy so that no older build helps, is installed on its own."""
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    pip("wheel", source, "--no-deps", "--wheel-dir", tmp_path)
    pip("install", "--no-deps", "--target", tmp_path / "site", *tmp_path.glob("*.whl"))
    return tmp_path / "site"


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
    picture = ROOT / "examples" / "shapes.png"
    done = subprocess.run(
        [installed / "bin" / "pixtral", "run", "--model-path", "tiny", "-i", picture, "-p", "How many shapes?"],
        cwd=elsewhere, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() and done.stderr == b""
