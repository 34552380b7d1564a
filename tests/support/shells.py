"""A shell at a pseudo-terminal, with `pixtral` on its path: lines are typed, Tab is pressed, what came is told."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from support.processes import PATIENCE, PROGRAM, clean_environment

COMMANDS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
ESCAPES = re.compile(r"\x1b(\[[0-9;?<>=]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[()][A-Z0-9]|[=>78cM])")
STAND_IN = f"""#!/bin/sh
# Typed by a test it tells its arguments; asked by a completion it is the real program.
[ "$1" = completions ] && exec {" ".join(PROGRAM)} "$@"
exec {sys.executable} -c 'import json, sys; print("typed:" + json.dumps(sys.argv[1:]) + ":")' "$@"
"""


class Shell:
    """`setup` is what the shell reads first. The shell lives in `home`, which is also where it stands."""

    def __init__(self, name: str, home: Path, setup: str, **environment: str):
        self.name, self.home = name, home
        program = home / "bin" / "pixtral"
        program.parent.mkdir()
        program.write_text(STAND_IN)
        program.chmod(0o755)
        here = {"HOME": str(home), "TERM": "xterm", "PATH": f"{program.parent}:{os.environ['PATH']}", "PS1": "$ "}
        here |= {f"XDG_{kind}_HOME": str(home / f".{kind.lower()}") for kind in ("CONFIG", "DATA", "CACHE")}
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 200, 0, 0))
        (home / "setup").write_text(setup)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *COMMANDS[name]], stdin=theirs, stdout=theirs, stderr=theirs, cwd=home / "here",
            env=clean_environment(**here, **environment),
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""
        self.type("source ../setup\npixtral ready\n")
        self.wait(r"typed:\[\"ready\"\]:")

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def wait(self, pattern: str) -> re.Match:
        """What the terminal has shown since the last call that matches; all of it up to there is forgotten."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, self.shown
            if select.select([self.ours], [], [], 1)[0]:
                self.shown = ESCAPES.sub("", self.shown + os.read(self.ours, 65536).decode(errors="replace"))
        self.shown = self.shown[found.end() :]
        return found

    def arguments(self, line: str) -> list[str]:
        """The arguments that `pixtral` gets when the line is typed, Tab is pressed at its end, and Enter."""
        self.type(f"{line}\t\n")
        return json.loads(self.wait(r"typed:(\[.*?\]):")[1])

    def offers(self, line: str, *wanted: str) -> None:
        """Waits until Tab at the end of the line shows all that is wanted, in any order; then the line is dropped."""
        self.type(f"{line}\t\t")
        self.wait("".join(f"(?=.*{re.escape(text)})" for text in ("", *wanted)).replace(".*", r"[\s\S]*"))
        self.type("\x15pixtral dropped\n")
        self.wait(r"typed:\[\"dropped\"\]:")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


def installed(name: str) -> bool:
    return shutil.which(name) is not None
