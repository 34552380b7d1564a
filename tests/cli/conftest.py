"""The command line for tests: `fake` and `program` run it as a process, `call` and `refused` run it inside this one."""

import signal
import subprocess

import pytest
from support.processes import FAKE, PROGRAM, clean_environment, run_process


@pytest.fixture
def fake():
    """Run `pixtral` with the fake model; streams are bytes, standard input is empty unless given."""
    return lambda *arguments, **settings: run_process(FAKE, arguments, **settings)


@pytest.fixture
def program():
    """Run the real `pixtral`; streams are bytes, standard input is empty unless given."""
    return lambda *arguments, **settings: run_process(PROGRAM, arguments, **settings)


def starting(command):
    started = []

    def start(*arguments, env=None, stdin=subprocess.PIPE):
        streams = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([*command, *arguments], env=clean_environment(**(env or {})), **streams))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def start_fake():
    """Start `pixtral` with the fake model and give back the process, with pipes; it is killed when the test ends."""
    yield from starting(FAKE)


@pytest.fixture
def start_program():
    """As `start_fake`, with the real `pixtral`."""
    yield from starting(PROGRAM)


@pytest.fixture
def call(monkeypatch, capfd):
    """Run one command line inside this process; gives (exit code, standard output, standard error)."""
    from pixtral_cli.cli.main import run_program

    monkeypatch.delenv("PIXTRAL_DEBUG", raising=False)
    monkeypatch.delenv("PIXTRAL_MODEL_PATH", raising=False)
    before = signal.getsignal(signal.SIGINT)

    def run(*arguments):
        code = run_program(list(arguments))
        return (code, *capfd.readouterr())

    yield run
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def refused(call):
    """Run one command line that ends in an error; gives what it tells: a sentence, and a line with what to do next."""

    def run(*arguments, code=1):
        given, out, err = call(*arguments)
        assert (given, out) == (code, "") and err.startswith("pixtral: error: ") and len(err.splitlines()) == 2, err
        return err

    return run


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches, far from the user's own; gives the Hub's."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "home/hub"
