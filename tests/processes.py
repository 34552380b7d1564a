"""The command line as a process, for tests: the real program, and the same program with a fake model."""

import os
import subprocess
import sys
from pathlib import Path

FAKE = [sys.executable, str(Path(__file__).parent / "cli" / "fake_pixtral.py")]
PROGRAM = [sys.executable, "-m", "pixtral_cli"]


def clean_environment(**extra):
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIXTRAL_", "FAKE_", "_TYPER", "NO_COLOR", "FORCE_COLOR"))
    }
    return kept | {"PYTHONUNBUFFERED": "", "COLUMNS": "100"} | extra


def run_process(command, arguments, *, input=None, stdin=None, env=None, timeout=60):
    streams = {"input": input} if input is not None else {"stdin": stdin or subprocess.DEVNULL}
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        env=clean_environment(**(env or {})),
        timeout=timeout,
        **streams,
    )
