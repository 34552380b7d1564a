"""The command line as a process, for tests: the real program, and the same program with a fake model."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

FAKE = [sys.executable, str(Path(__file__).parent / "fake_pixtral.py")]
PROGRAM = [sys.executable, "-m", "pixtral_cli"]
HEAVY = """torch torch._dynamo transformers bitsandbytes huggingface_hub PIL jinja2 tokenizers numpy rich
safetensors""".split()

PATIENCE = 120
"""Seconds in which whatever is waited for comes, on the busiest machine: nothing waits so long when all is well."""


def wait_until(holds):
    """What `holds()` gives, as soon as that is true."""
    deadline = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)
    return found


def clean_environment(**extra):
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "PIXTRAL_CACHE" or not name.startswith(("PIXTRAL_", "FAKE_", "_TYPER", "NO_COLOR", "FORCE_COLOR"))
    }
    one_thread = {"OMP_NUM_THREADS": "1"}  # small models are quicker so, above all on a busy machine
    return kept | {"PYTHONUNBUFFERED": "", "COLUMNS": "100"} | one_thread | extra


def run_process(command, arguments=(), *, input=None, env=None, timeout=PATIENCE, **streams):
    """Run it to its end. Streams are bytes: standard input is empty and the others are collected, unless given."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    given |= {"stdin": given.get("stdin") or subprocess.DEVNULL} if input is None else {"input": input}
    return subprocess.run([*command, *arguments], env=clean_environment(**(env or {})), timeout=timeout, **given)


def run_line(line, **settings):
    """Run a line of bash, in which $PIXTRAL is the program and $FAKE the one with the fake model."""
    programs = {"PIXTRAL": shlex.join(PROGRAM), "FAKE": shlex.join(FAKE)}
    for name, command in programs.items():
        line = line.replace(f"${name}", command)
    return run_process(["bash", "-c"], [line], **settings)


def imported_by(*arguments, among=HEAVY, **environment):
    """Those of the modules `among` that a run of the program has imported when it ends."""
    program = (
        "import atexit, json, sys\n"
        f"atexit.register(lambda: print(json.dumps([m for m in {among!r} if m in sys.modules]), file=sys.stderr))\n"
        f"sys.argv = {['pixtral', *arguments]!r}\n"
        "from pixtral_cli.__main__ import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=clean_environment(**environment), timeout=PATIENCE
    )
    return json.loads(done.stderr.splitlines()[-1])
