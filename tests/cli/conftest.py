"""The command line for tests: `fake` and `program` run it as a process, `call` runs it inside this one."""

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


@pytest.fixture
def start_fake():
    """Start `pixtral` with the fake model and give back the process; it is killed when the test ends."""
    started = []

    def start(*arguments, env=None, **settings):
        process = subprocess.Popen([*FAKE, *arguments], env=clean_environment(**(env or {})), **settings)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


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
def caches(tmp_path, monkeypatch):
    """Empty caches, far from the user's own; gives the Hub's."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "home/hub"
