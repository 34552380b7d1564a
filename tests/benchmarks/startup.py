"""How long the command takes to start: `python tests/benchmarks/startup.py [--rounds N] [--picture FILE]`.

Each round times the two commands of every pair one after the other, so that a busy machine slows both. Prints the
median and the spread (the middle half) of the pairs' differences and ratios. Times are seconds of a whole process.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "pixtral_cli"]


def seconds(command: list[str]) -> float:
    """Wall time of one run of `command`. Raises CalledProcessError when it fails."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return time.perf_counter() - begun


def pairs(picture: Path, model: str) -> dict[str, tuple[list[str], list[str]]]:
    """What is timed, and beside what."""
    question = ["--model-path", model, "-i", str(picture), "-p", "What shape is it?"]
    short = [*question, "--max-new-tokens", "8"]
    nothing = [sys.executable, "-c", "pass"]
    torch = [sys.executable, "-c", "import torch"]
    return {
        "pixtral --help, beside python -c pass": ([*PROGRAM, "--help"], nothing),
        "pixtral run --help, beside python -c pass": ([*PROGRAM, "run", "--help"], nothing),
        "pixtral tokenize, beside python -c pass": ([*PROGRAM, "tokenize", *question], nothing),
        "pixtral run, beside python -c 'import torch'": ([*PROGRAM, "run", *short], torch),
        "pixtral serve until /ready, beside python -c 'import torch'": (
            [sys.executable, __file__, "--serve-until-ready", "--model-path", model],
            torch,
        ),
    }


def serve_until_ready(model: str) -> None:
    """Start `pixtral serve` and end it as soon as /ready is 200."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([*PROGRAM, "serve", "--model-path", model, "--port", str(port), "--quiet"]) as process:
        while not answers(f"http://127.0.0.1:{port}/ready") and process.poll() is None:
            time.sleep(0.01)
        process.kill()


def answers(url: str) -> bool:
    """Whether a GET gives 200."""
    try:
        return urllib.request.urlopen(url).status == 200
    except OSError:
        return False


def summary(values: list[float]) -> str:
    """Median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:6.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model-path", default="tiny")
    parser.add_argument("--picture", type=Path, default=next(iter(sorted(ROOT.glob("examples/*.png"))), None))
    parser.add_argument("--serve-until-ready", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_until_ready:
        return serve_until_ready(options.model_path)
    if options.picture is None:
        parser.error("there is no picture in examples/: name one with --picture")
    print(f"{options.rounds} rounds, {os.cpu_count()} cores; median (middle half), in seconds")
    for name, (command, beside) in pairs(options.picture, options.model_path).items():
        seconds(command), seconds(beside)  # once for the file cache
        rounds = [(seconds(command), seconds(beside)) for _ in range(options.rounds)]
        print(f"\n{name}")
        print(f"  whole   {summary([first for first, _ in rounds])}")
        print(f"  beyond  {summary([first - second for first, second in rounds])}")
        print(f"  ratio   {summary([first / second for first, second in rounds])}")


if __name__ == "__main__":
    main()
