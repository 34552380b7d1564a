"""The one place that prints: the answer on standard output, all else on standard error. Knows no model.

Standard output takes the answer, streamed, or one JSON object. Progress bars show only where standard error is
a terminal that can move its cursor. Which streams take escape codes is decided here for all of the program. A
terminal never sees a control character that came out of a model or a file name: those could move its cursor,
rename its window or fake a prompt, so they are shown as visible signs instead.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TextIO

from pixtral_cli.errors import PixtralError

if TYPE_CHECKING:
    from weights_cache.progress import Progress

CHECK_OUTPUT = "Check where standard output goes, and the room there."
DUMB = ("dumb", "unknown")
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
SHOW_CURSOR = "\x1b[?25h"
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_CONTROL |= {0x0D: "", 0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


class OutputClosed(Exception):
    """Whoever read standard output has gone: no more work is worth doing, and nothing is wrong."""


def printable(text: str) -> str:
    """`text` with every control character but newline and tab made visible."""
    return text.translate(_CONTROL)


def readable(text: str) -> str:
    """`text` without the lone surrogates that stand for a file name's bytes where the locale cannot read them."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # surrogates from elsewhere
        return text.encode("utf-8", "replace").decode()


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees what is written to `stream`."""
    return stream is not None and not stream.closed and stream.isatty()


def moves_cursor(stream: TextIO | None) -> bool:
    """Whether the terminal behind `stream` follows escape codes: one of type `dumb` shows them as text."""
    return is_terminal(stream) and os.environ.get("TERM") not in DUMB


def is_styled(stream: TextIO | None) -> bool:
    """Whether colour and bold are welcome on `stream`. NO_COLOR, unless it is empty, wants neither (no-color.org)."""
    return moves_cursor(stream) and not os.environ.get("NO_COLOR")


class Console:
    """Prints one command's results. With `json` the answer is one object; with `quiet` only errors are told."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json, self.quiet = json, quiet
        self._on_terminal = is_terminal(sys.stdout)
        self._shows_progress = moves_cursor(sys.stderr) and not quiet
        self._at_line_start = True
        self._thinking = False  # whether a thought was written last
        if isinstance(sys.stdout, TextIOWrapper):
            encoding = None if self._on_terminal else "utf-8"
            sys.stdout.reconfigure(encoding=encoding, errors="replace")

    def write(self, text: str, style: str = "") -> None:
        """Put `text` on standard output at once, after the escape code `style`. Raises OutputClosed, or PixtralError (a
        full disk)."""
        if not text or sys.stdout is None:
            return
        self._at_line_start = text.endswith("\n")
        try:
            shown = printable(text) if self._on_terminal else text
            sys.stdout.write(f"{style}{shown}{PLAIN}" if style else shown)
            sys.stdout.flush()
        except BrokenPipeError as error:
            abandon_stdout()
            raise OutputClosed from error
        except OSError as error:
            abandon_stdout()
            raise PixtralError(f"The answer cannot be written: {error.strerror}.", CHECK_OUTPUT) from error

    def end_line(self) -> None:
        """Finish the line that the answer ends in, if it is not finished."""
        if not self._at_line_start:
            self.write("\n")

    def object(self, value: dict[str, Any]) -> None:
        """Print one JSON object on one line (indented for a person at a terminal)."""
        self.write(json.dumps(_finite(value), ensure_ascii=False, indent=2 if self._on_terminal else None) + "\n")

    def result(self, value: dict[str, Any], text: str) -> None:
        """Print what the command found: with `json` the object `value`, else `text`, which ends its own lines."""
        if self.json:
            self.object(value)
        else:
            self.write(text)

    def notice(self, text: str) -> None:
        """Tell something by the way, on standard error, terminal or not: nobody would learn of it otherwise."""
        if not self.quiet:
            _to_stderr(f"pixtral: {text}")

    def detail(self, text: str) -> None:
        """Tell what was asked for beside the answer, on standard error."""
        if not self.quiet:
            _to_stderr(text)

    def confirm(self, question: str) -> bool:
        """Whether the person at the terminal answers yes; asked on standard error, even with `quiet`."""
        _to_stderr(f"{question} [y/N] ", end="")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def progress(self, first_label: str) -> AbstractContextManager[Progress | None]:
        """Bars on standard error while something loads; the value is to be called with each step, or None."""
        if not self._shows_progress:
            return nullcontext()
        from pixtral_cli.cli.progress_bars import bars

        return bars(first_label, styled=is_styled(sys.stderr))

    @contextmanager
    def waiting(self, label: str) -> Iterator[Any]:
        """A moving sign on standard error until the block ends or calls the value it gets."""
        if not self._shows_progress:
            yield lambda: None
            return
        from pixtral_cli.cli.progress_bars import status

        with status(label, styled=is_styled(sys.stderr)) as stop:
            yield stop

    @contextmanager
    def doing(self, label: str) -> Iterator[Callable[[str], None]]:
        """As `waiting`; the value is to be called with what is being done next."""
        if not self._shows_progress:
            yield lambda label: None
            return
        from pixtral_cli.cli.progress_bars import changing

        with changing(label, styled=is_styled(sys.stderr)) as change:
            yield change

    def stream(self, events: Generator[Any, None, None], *, thoughts: bool = True) -> Any:
        """Print each event's text as it comes (with `json`, nothing) and give back the last event's reply.

        A person at a terminal sees what the model thinks as well, dimmed and before the answer, unless without
        `thoughts`; a pipe or a file gets the answer alone.

        Whatever ends it early, the events' source is closed, so that no work goes on, and what was printed
        stays, its line finished.
        """
        reply = None
        shows_thoughts = thoughts and self._on_terminal and not self.json
        try:
            with self.waiting("reading the prompt") as stop_waiting:
                for event in events:
                    if shows_thoughts or not event.reasoning_content:
                        stop_waiting()
                    if shows_thoughts and event.reasoning_content:
                        self._write_thought(event.reasoning_content)
                    if event.text and not self.json:
                        self._end_thought()
                        self.write(event.text)
                    reply = getattr(event, "reply", None) or reply
        finally:
            events.close()
            with suppress(OutputClosed):
                self.end_line()
        return reply

    def _write_thought(self, text: str) -> None:
        """More of a thought: dimmed, or between marks where nothing is."""
        styled = is_styled(sys.stdout)
        if not (self._thinking or styled):
            self.write("<think>\n")
        self._thinking = True
        self.write(text, DIM if styled else "")

    def _end_thought(self) -> None:
        if self._thinking:
            self.end_line()
            self.write("\n" if is_styled(sys.stdout) else "</think>\n\n")
        self._thinking = False


def table(rows: Sequence[Sequence[Any]], align: str = "<", gap: str = "  ") -> list[str]:
    """A line for each row, its cells below one another and `gap` apart.

    `align` has `<` (left) or `>` (right) for each column; its last sign stands for all that follow. A last column
    to the left is not filled up with spaces.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    signs = align.ljust(len(widths), align[-1])
    if signs[-1:] == "<":
        widths[-1] = 0
    return [
        gap.join(f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=True)) for row in cells
    ]


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and its noun: `1 token`, `3 tokens`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def tell_error(sentence: str, hint: str | None = None) -> None:
    """Print an error, and the next thing to do, on standard error: a line for each, whatever a server wrote in it."""
    prefix = "pixtral: error:"
    if is_styled(sys.stderr):
        prefix = f"\x1b[1;31m{prefix}\x1b[0m"
    _to_stderr(_one_line(sentence), prefix + " ")
    if hint:
        _to_stderr(_one_line(hint))


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def tell_traceback() -> None:
    """Print the traceback of the exception being handled."""
    import traceback

    _to_stderr(traceback.format_exc().rstrip("\n"))


def restore_terminal() -> None:
    """Show the cursor again, which a progress bar may have hidden."""
    if moves_cursor(sys.stderr):
        with suppress(OSError):
            os.write(sys.stderr.fileno(), SHOW_CURSOR.encode())


def flush_stdout() -> bool:
    """Put out what is left. False, and an error on standard error, where it has no room; a reader may have gone."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        abandon_stdout()
    except OSError as error:
        abandon_stdout()
        tell_error(f"Standard output cannot be written: {error.strerror}.", CHECK_OUTPUT)
        return False
    return True


def _to_stderr(text: str, prefix: str = "", end: str = "\n") -> None:
    if sys.stderr is None:
        return
    text = readable(text)
    with suppress(OSError, ValueError):
        sys.stderr.write(prefix + (printable(text) if is_terminal(sys.stderr) else text) + end)
        sys.stderr.flush()


def abandon_stdout() -> None:
    """Point standard output nowhere, so that the interpreter's last flush cannot fail as well."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _finite(value: Any) -> Any:
    """`value` with infinities and not-a-numbers, which JSON does not have, as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
