"""README.md keeps its word: its commands are the program's, and CI runs the one that it shows."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def block_under(heading):
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"```\w+\n(.*?)```", section, re.DOTALL)


def test_quick_start_and_tests_are_one_command_each():
    assert [len(block_under(heading)) for heading in ("Quick start", "Tests")] == [1, 1]
    assert all(len(block_under(heading)[0].splitlines()) == 1 for heading in ("Quick start", "Tests"))


def test_ci_runs_the_command_of_the_readme(tmp_path):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/run").write_text((ROOT / ".ci/run").read_text())
    (tmp_path / "README.md").write_text(README.replace(block_under("Tests")[0], 'echo "ran in $PWD" && false\n'))
    nothing_to_install = tmp_path / "bin" / "apt-get"
    nothing_to_install.parent.mkdir()
    nothing_to_install.write_text("#!/bin/sh\nexit 1\n")
    nothing_to_install.chmod(0o755)
    path = f"{nothing_to_install.parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env={"PATH": path}, capture_output=True)
    assert done.returncode == 1 and done.stdout.decode().endswith(f"ran in {tmp_path}\n")


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    named += re.findall(r"examples/\w+\.\w+", README)
    assert len(named) > 5 and [name for name in named if not (ROOT / name).exists()] == []


def test_every_flag_that_the_readme_names_is_in_the_help(program):
    pages = [["run"], ["serve"], ["bench"], [], ["cache", "prune"]]
    known = b"".join(program(*page, "--help").stdout for page in pages).decode()
    named = set(re.findall(r"--[a-z][a-z-]+", README.partition("## Real checkpoints")[2]))
    assert len(named) > 15 and {flag for flag in named if flag not in known} == set()


@pytest.mark.slow
def test_the_python_of_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(block_under("Python")[0], "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for block in block_under("Pipelines") for line in block.splitlines()])
def test_the_pipelines_of_the_readme_run(line, tmp_path):
    import sys

    shim = tmp_path / "pixtral"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m pixtral_cli "$@"\n')
    shim.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=ROOT, env={"PATH": path}, capture_output=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout and done.stderr == b""
