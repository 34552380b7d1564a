"""At a terminal: a pseudo-terminal stands in for it."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest
from support.hub_cache import put
from support.processes import FAKE, PATIENCE, clean_environment, run_line


class Terminal:
    """`pixtral` with the fake model, with some of its streams on a terminal. What it shows collects in `shown`."""

    def __init__(self, *arguments, streams=(0, 1, 2), env=None):
        self.ours, theirs = pty.openpty()
        names = ("stdin", "stdout", "stderr")
        chosen = {name: theirs if number in streams else subprocess.PIPE for number, name in enumerate(names)}
        environment = clean_environment(**{"TERM": "xterm"} | (env or {}))
        self.process = subprocess.Popen([*FAKE, *arguments], env=environment, start_new_session=True, **chosen)
        os.close(theirs)
        self.shown = b""

    def read_until(self, wanted=None):
        """Collect until `wanted` shows, or, without it, until the terminal closes."""
        end = time.monotonic() + PATIENCE
        while wanted is None or wanted not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.ours], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self.ours, 4096)
                except OSError:  # the other side has closed
                    break
        return self.shown

    def finish(self):
        self.read_until()
        return self.process.wait(timeout=PATIENCE)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


@pytest.fixture
def terminal():
    opened = []

    def start(*arguments, **settings):
        opened.append(Terminal(*arguments, **settings))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_terminal_as_standard_input_is_never_read(terminal):
    shown = terminal("run", "-p", "hi")
    assert shown.finish() == 0 and b"<user>hi" in shown.shown


def test_nothing_asked_at_a_terminal_is_a_usage_error(terminal):
    shown = terminal("run")
    assert shown.finish() == 2 and b"There is no prompt" in shown.shown


def test_a_model_cannot_drive_the_terminal(terminal):
    shown = terminal("run", "-p", "escape", streams=(0, 1))
    assert shown.finish() == 0
    assert shown.shown.decode() == "\u241b]0;owned\u2407red\u241b[31m\ufffd2Jplain\r\n"


ASKED = ("run", "-p", "thinking")
ANSWER = b"<user>thinking"


def test_a_thought_is_dimmed_and_stands_before_the_answer(terminal):
    shown = terminal(*ASKED, streams=(0, 1))
    assert shown.finish() == 0
    dimmed = "\x1b[2mWell\x1b[0m\x1b[2m\u241b[31m, then.\r\n\x1b[0m\r\n"
    assert shown.shown == dimmed.encode() + ANSWER + b"\r\n"


def test_where_nothing_is_dimmed_a_thought_stands_between_marks(terminal):
    shown = terminal(*ASKED, streams=(0, 1), env={"NO_COLOR": "1"})
    assert shown.finish() == 0
    assert shown.shown == "<think>\r\nWell\u241b[31m, then.\r\n</think>\r\n\r\n".encode() + ANSWER + b"\r\n"


def test_a_thought_is_not_shown_where_it_is_not_wanted(terminal):
    shown = terminal(*ASKED, "--no-reasoning", streams=(0, 1))
    assert shown.finish() == 0 and shown.shown == ANSWER + b"\r\n"


def test_a_file_name_cannot_drive_the_terminal(terminal):
    shown = terminal("run", "-p", "hi", "-i", "\x1b[2J.png", streams=(0, 1, 2), env={"NO_COLOR": "1"})
    assert shown.finish() == 1 and b"\x1b[2J" not in shown.shown and "\u241b[2J.png" in shown.shown.decode()


def test_progress_shows_on_a_terminal_and_leaves_no_trace_in_the_answer(terminal):
    shown = terminal("run", "-p", "hi", streams=(2,), env={"FAKE_LOAD_S": "0.3"})
    shown.process.stdin.close()
    assert shown.finish() == 0
    assert b"weights [1/1]" in shown.shown and shown.process.stdout.read() == b"<user>hi\n"
    assert shown.shown.rfind(b"\x1b[?25h") >= shown.shown.rfind(b"\x1b[?25l")  # the cursor is back


def test_a_gguf_without_a_name_is_not_called_none_while_it_loads(terminal, tmp_path):
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    shown = terminal("run", "-p", "hi", "--weight-path", str(tmp_path / "own.gguf"), env={"FAKE_LOAD_S": "0.3"})
    assert shown.finish() == 0 and b"loading a GGUF" in shown.shown and b"None" not in shown.shown


def test_quiet_shows_no_progress(terminal):
    shown = terminal("run", "-p", "hi", "--quiet", streams=(2,))
    shown.process.stdin.close()
    assert shown.finish() == 0 and shown.shown == b""


@pytest.fixture
def shown_by(terminal, caches):
    """What the terminal shows when `pixtral` runs to its end; one model is cached, and loading takes a moment."""
    put(caches, "acme/pixie", {"model-Q4_K_M.gguf": b"GGUF"})

    def run(*arguments, **environment):
        surroundings = {"PIXTRAL_CACHE": os.environ["PIXTRAL_CACHE"], "FAKE_LOAD_S": "0.3"}
        shown = terminal(*arguments, env=surroundings | environment)
        shown.finish()
        return shown.shown

    return run


PRINTING = {
    "help": ["--help"],
    "help of a command": ["run", "--help"],
    "no arguments": [],
    "an error in the flags": ["run", "--top-k", "x"],
    "an error": ["run"],
    "a table": ["cache", "list"],
    "progress": ["run", "-p", "hi"],
}
STYLE = re.compile(rb"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("arguments", PRINTING.values(), ids=PRINTING)
def test_a_dumb_terminal_gets_no_escape_codes(shown_by, arguments):
    shown = shown_by(*arguments, TERM="dumb")
    assert shown and b"\x1b" not in shown


@pytest.mark.parametrize("arguments", PRINTING.values(), ids=PRINTING)
def test_no_color_is_neither_colour_nor_bold(shown_by, arguments):
    shown = shown_by(*arguments, NO_COLOR="1")
    assert shown and STYLE.findall(shown) == []


@pytest.mark.parametrize("name", ["help", "help of a command", "no arguments", "an error", "progress"])
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": ""}])
def test_any_other_terminal_gets_bold_or_colour(shown_by, name, environment):
    assert STYLE.search(shown_by(*PRINTING[name], **environment))


@pytest.mark.parametrize("name", ["help", "an error", "progress"])
def test_what_is_no_terminal_gets_no_escape_codes(fake, name):
    done = fake(*PRINTING[name], env={"TERM": "xterm"})
    assert done.stdout + done.stderr and b"\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("streams", [(0, 1, 2), (0, 2)])
def test_an_interrupt_keeps_the_answer_so_far_and_leaves_with_130(terminal, streams):
    shown = terminal("run", "-p", "slowly", streams=streams)
    if 1 in streams:
        shown.read_until(b"word1 ")
    else:
        assert shown.process.stdout.read1(6)
    shown.process.send_signal(signal.SIGINT)
    assert shown.finish() == 130 and b"Traceback" not in shown.shown
    if 1 in streams:
        assert shown.shown.endswith(b" \r\n")


def test_an_interrupt_while_loading_leaves_with_130_and_the_cursor(terminal):
    shown = terminal("run", "-p", "hi", env={"FAKE_LOAD_S": "20"})
    shown.read_until(b"loading")
    time.sleep(0.2)
    shown.process.send_signal(signal.SIGINT)
    assert shown.finish() == 130 and b"Traceback" not in shown.shown and b"error" not in shown.shown
    assert shown.shown.rfind(b"\x1b[?25h") > shown.shown.rfind(b"\x1b[?25l")


def waits_for_more(process):
    """Whether all that was sent has been read, and the process sleeps in the next read."""
    left = struct.unpack("i", fcntl.ioctl(process.stdin, termios.FIONREAD, bytes(4)))[0]
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return left == 0 and state == "S"


def test_an_interrupt_while_waiting_for_input_leaves_with_130(start_fake):
    process = start_fake("run")
    process.stdin.write(b"the first words")
    process.stdin.flush()
    while not waits_for_more(process):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE) == 130 and process.stderr.read() == b""


@pytest.mark.parametrize(
    "module", ["pixtral_cli.cli.main", "typer", "pydantic", "weights_cache.errors", "pixtral_cli.cli.progress_bars"]
)
def test_an_interrupt_in_the_middle_of_an_import_gives_no_traceback(terminal, module):
    shown = terminal("run", "-p", "bug", env={"FAKE_INTERRUPT_AT": module})
    assert shown.finish() == 130 and b"Traceback" not in shown.shown and b"error" not in shown.shown


@pytest.mark.parametrize("order", ["interrupted in exec", "swallowing"])
def test_an_interrupt_that_python_itself_would_lose_leaves_with_130(fake, order):
    done = fake("run", "-p", order)
    assert (done.returncode, done.stderr) == (130, b"") and done.stdout.startswith(b"begun")


def test_a_process_started_with_interrupts_ignored_keeps_ignoring_them():
    line = "trap '' INT; $FAKE run -p hi & pid=$!; sleep 0.4; kill -INT $pid; wait $pid"
    done = run_line(line, env={"FAKE_LOAD_S": "1"})
    assert (done.returncode, done.stdout) == (0, b"<user>hi\n")
