"""Runs the commands below for real and draws the terminal that they leave: `python docs/terminal.py`.

Writes docs/terminal.svg, which README.md shows. Run it again whenever the built-in model or a picture changes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    'pixtral run --model-path tiny -i examples/shapes.png -p "What colour is the triangle?"',
    'pixtral run --model-path tiny -i examples/sign.png -p "What does the sign say?"',
    'pixtral run --model-path tiny -i examples/first.png -i examples/second.png -p "Which picture has more shapes?"',
    'echo "Where is the star?" | pixtral run --model-path tiny -i examples/shapes.png --json | jq -c .text,.usage',
)


def output(command: str) -> str:
    """What `command` prints, standard error included, with `pixtral` from this very Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout


def main() -> None:
    screen = Console(record=True, width=116, file=StringIO(), force_terminal=True)
    for command in COMMANDS:
        line = Text.assemble(("$ ", "dim"), command)
        line.highlight_words(["pixtral"], "bold cyan")
        screen.print(line)
        screen.print(Text(output(command)))
    screen.save_svg(str(ROOT / "docs" / "terminal.svg"), title="pixtral")


if __name__ == "__main__":
    main()
