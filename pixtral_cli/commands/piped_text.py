"""Standard input in, the text that goes before the prompt out. Decides how long a silent pipe is waited for.

A terminal, a device or a closed input gives nothing; a file is read. A pipe with nothing in it could be a slow
program (`pdftotext x.pdf - | pixtral run -p …`) or merely what this process inherited from a shell script, cron
or a supervisor, which will never say a word. So:

- without any other request the input *is* the request: wait for it;
- beside a prompt, look again when the model is loaded. Something there: read it to its end. Nothing: if the
  writer is a program next to this one (not one of those that started it), give it PATIENCE seconds from the
  start, else GRACE; then go on without.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pixtral_cli.cli.flags import UsageError

GRACE = 0.5
"""Seconds, from the start, in which an inherited pipe may begin to speak."""
PATIENCE = 10.0
"""Seconds, from the start, in which a program in the same pipeline may begin to speak."""
LIMIT = 64 * 2**20
"""Bytes of text that are read at most: far more than any context holds."""


class PipedText:
    """The text on standard input, if there is any; `silent_writer` tells afterwards of a pipe given up on."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._kind = _kind_of_stdin()
        self.silent_writer = False

    def now(self) -> str:
        """The text, waited for however long it takes. Raises UsageError when it is not text."""
        return _read_text() if self._kind else ""

    def if_any(self) -> str:
        """The text, or "" when nothing has come by the time that the module's rule allows."""
        if self._kind == "pipe" and not _ready(self._left(GRACE)):
            self.silent_writer = _written_by_a_neighbour()
            if not self.silent_writer or not _ready(self._left(PATIENCE)):
                return ""
            self.silent_writer = False
        return self.now()

    def _left(self, seconds: float) -> float:
        return max(0.0, self._started + seconds - time.monotonic())


def _kind_of_stdin() -> str | None:
    """`file`, `pipe` (or a socket), or None for what is never read."""
    with suppress(OSError, ValueError, AttributeError):  # closed, or replaced by something without a descriptor
        mode = os.fstat(sys.stdin.fileno()).st_mode
        if stat.S_ISREG(mode):
            return "file"
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            return "pipe"
    return None


def _ready(seconds: float) -> bool:
    """Whether a byte or the end of the input comes within that time."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
    return bool(poll.poll(seconds * 1000))


def _pieces() -> Iterator[bytes]:
    """Standard input up to its end or just over the limit; between two pieces an interrupt is noticed."""
    length = 0
    while length <= LIMIT and (piece := sys.stdin.buffer.read1(LIMIT + 1 - length)):
        length += len(piece)
        yield piece


def _read_text() -> str:
    data = b"".join(_pieces())
    if len(data) > LIMIT:
        raise UsageError(f"Standard input holds more than {LIMIT // 2**20} MiB of text.", "Send less of it.")
    try:
        text = data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"Standard input is not UTF-8 text (byte {error.start + 1}).",
            "For a picture, write: --image - ; other text becomes UTF-8 with: iconv -f latin1 -t utf-8",
        ) from error
    return text if text.strip() else ""


def _written_by_a_neighbour() -> bool:
    """Whether a process that did not start this one can write to its standard input (Linux; else False)."""
    with suppress(OSError):
        target = os.readlink(f"/proc/self/fd/{sys.stdin.fileno()}")
        kin = {os.getpid(), *_ancestors(os.getpid())}
        processes = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
        return any(_can_write(pid, target) for pid in processes if pid not in kin)
    return False


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        # "pid (name) state parent …", and the name may hold spaces and brackets
        pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        yield pid


def _can_write(pid: int, target: str) -> bool:
    with suppress(OSError):  # gone meanwhile, or another user's
        for number in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{number}") == target:
                flags = Path(f"/proc/{pid}/fdinfo/{number}").read_text().partition("flags:")[2].split()[0]
                if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    return False
