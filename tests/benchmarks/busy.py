"""How much slower answers get beside other programs.

    python tests/benchmarks/busy.py [--load 6] [--runs 5] [--tokens 64] [-- --model-path tiny ...]

Each process answers once. The settings alternate: as shipped, with one thread, and with libgomp's own waiting. They run
first on the idle machine, then beside `load` processes that keep the CPU busy. Prints medians (smallest, largest) in
tokens per second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import contextmanager

SETTINGS = {"as shipped": {}, "one thread": {"OMP_NUM_THREADS": "1"}, "libgomp's own": {"GOMP_SPINCOUNT": "10000000"}}
BUSY = "while True: sum(range(10_000))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=int, default=6)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("flags", nargs="*", default=["--model-path", "tiny"])
    options = parser.parse_args()
    for processes in (0, options.load):
        with load(processes):
            rates = measured(options.flags, options.tokens, options.runs)
        print(f"beside {processes} other processes:")
        for name, (prefill, decode) in rates.items():
            print(f"  {name:14} prefill {summary(prefill)}, decode {summary(decode)} tokens/s")


def measured(flags: list[str], tokens: int, runs: int) -> dict[str, tuple[list[float], list[float]]]:
    """For each setting, the rates of prefill and decode of every run."""
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in SETTINGS}
    prompt = "The quick brown fox jumps over the lazy dog. " * 10
    ask = ["run", *flags, "-p", prompt, "--max-new-tokens", str(tokens), "--ignore-eos", "--json", "--quiet"]
    for _ in range(runs):
        for name, setting in SETTINGS.items():
            kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
            done = subprocess.run(
                [sys.executable, "-m", "pixtral_cli", *ask],
                env=kept | setting, stdin=subprocess.DEVNULL, capture_output=True, check=True,
            )  # fmt: skip
            timings = json.loads(done.stdout)["timings"]
            rates[name][0].append(timings["prefill_tokens_per_s"])
            rates[name][1].append(timings["decode_tokens_per_s"])
    return rates


@contextmanager
def load(processes: int):
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def summary(rates: list[float]) -> str:
    return f"{statistics.median(rates):.1f} ({min(rates):.1f}, {max(rates):.1f})"


if __name__ == "__main__":
    main()
