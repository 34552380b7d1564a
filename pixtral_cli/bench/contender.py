"""A process with one program in it, ours or a peer: lines of JSON in, lines of JSON out; it runs until its input ends.

`python -m pixtral_cli.bench.contender NAME` is the process, `Contender` the other end. Each program has a process of
its own, so that no library disturbs the threads of another, and memory is counted for each. One that waits for a line
takes no processor time.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Protocol

from pixtral_cli import process_environment
from pixtral_cli.errors import PixtralError, is_out_of_memory

OURS = "pixtral"
MODULES = {
    OURS: "ours",
    "llama.cpp": "llama_cpp_peer",
    "transformers": "transformers_peer",
    "bitsandbytes": "transformers_peer",
}
WITH_TORCH = (OURS, "transformers", "bitsandbytes")
PROMPT = 16
"""Tokens before those that are decoded."""
NO_MEMORY = "Lower --batch-sizes, --prompt-tokens or --new-tokens, or choose an encoding of fewer bits."
ENDING = 5.0  # seconds for a process that is told to end


class Program(Protocol):
    """What the module of a program has as `Program`. Times are seconds of the work alone."""

    def load(self, model: dict[str, Any], threads: int, context: int, batch: int) -> float:
        """Load the model that `model` says where it is, for `batch` sequences of `context` tokens."""
        ...

    def about(self) -> dict[str, Any]:
        """What is worth knowing of it: its version, what it computes with."""
        ...

    def prefill(self, tokens: int) -> float:
        """Compute a prompt of random tokens, up to the choice of the first token after it."""
        ...

    def decode(self, tokens: int, batch: int) -> float:
        """Compute so many tokens for each of `batch` sequences, after a prompt of PROMPT tokens that is not timed."""
        ...

    def picture(self, width: int, height: int) -> float:
        """Compute the features of a picture of random pixels."""
        ...


class ContenderFailed(PixtralError):
    """A program in a process of its own failed, in its own words."""


class Contender:
    """A process with the program `name` in it. Raises ContenderFailed for what fails there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._told = tempfile.TemporaryFile()  # noqa: SIM115  what it says beside its answers; closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._told,
            text=True,
            env=process_environment.of_others(),
            start_new_session=True,  # an interrupt at the terminal is for the one who asks
        )

    def ask(self, what: str, **arguments: Any) -> Any:
        """What the program's method gives."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ContenderFailed(f"{self.name} ended by itself: {self._last_words()}.")
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderFailed(answer["error"], answer.get("hint"))
        return answer["value"]

    def _last_words(self) -> str:
        self._process.wait(ENDING)
        self._told.seek(0)
        lines = self._told.read().decode(errors="replace").strip().splitlines()
        return lines[-1].rstrip(".") if lines else f"exit code {self._process.returncode}"

    def end(self) -> None:
        """End the process, at once if it does not end by itself."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(ENDING)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._told.close()


def peak_memory() -> int:
    """The most bytes that this process has had in memory, those of mapped files included."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def serve(program: Program, questions: IO[str], answers: IO[str], importing: float = 0.0) -> None:
    """Answer each line until there are no more; `importing` are the seconds that importing torch took."""
    known = {"peak_memory": peak_memory, "import_torch": lambda: importing}
    for line in questions:
        question = json.loads(line)
        what = question.pop("what")
        try:
            value = known[what]() if what in known else getattr(program, what)(**question)
            answer: dict[str, Any] = {"value": value}
        except Exception as error:  # noqa: BLE001  whoever asks tells of it
            sentence, hint = str(error), getattr(error, "hint", None)
            if is_out_of_memory(error):
                sentence, hint = "There is not enough memory for this.", NO_MEMORY
            elif hint is None:
                sentence = f"{type(error).__name__}: {error}"
            answer = {"error": sentence, "hint": hint}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main(name: str) -> None:
    """Standard output is for answers alone: what a library prints goes to standard error."""
    if name == OURS:
        process_environment.prepare()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begun = time.perf_counter()
    if name in WITH_TORCH:
        importlib.import_module("torch")
    importing = time.perf_counter() - begun
    module = importlib.import_module(f"{__package__}.{MODULES[name]}")
    serve(module.Program(), sys.stdin, answers, importing)


if __name__ == "__main__":
    main(sys.argv[1])
