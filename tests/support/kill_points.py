"""An action killed at its every step, for tests: just before each file is opened, renamed, linked or removed, and each
time that it reports progress. Forks, so it is for a process without other threads."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.symlink", "os.truncate", "os.rmdir", "os.utime"}
Action = Callable[[Callable[..., None]], object]


def run(action: Action, watched: Path, at: int | None = None) -> bool:
    """Whether `action(progress)`, in a process of its own, ends before its step `at`, where SIGKILL meets it.

    Steps that concern files count where they are in `watched`. AssertionError if the action fails.
    """
    process = os.fork()
    if process == 0:
        try:
            _run_here(action, watched, at)
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == 0, (at, status)
    return not killed


def _run_here(action: Action, watched: Path, at: int | None) -> None:
    steps = 0

    def step(*_: object) -> None:
        nonlocal steps
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1

    def hear(event: str, arguments: tuple) -> None:
        if event in EVENTS and any(str(watched) in str(each) for each in arguments[:2]):
            step()

    sys.addaudithook(hear)
    action(step)
    os._exit(0)
