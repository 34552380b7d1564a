"""How fast weights are encoded and decoded: `python tests/benchmarks/encoding.py [--rounds N] [ENCODING ...]`.

Uses one matrix of bfloat16 weights and one thread, and measures processor time. So the figures are MB of bfloat16 per
second and core, and other programs affect them little. The encodings are measured in turn. Prints the median and the
spread (the middle half) of each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from weights_cache import codecs

NAMES = ("q4_0", "q4_k", "q6_k", "q8_0")


def speed(nbytes: int, action: Callable[[], object]) -> float:
    """MB per second of processor time."""
    begun = time.process_time()
    action()
    return nbytes / (time.process_time() - begun) / 1e6


def summary(values: list[float]) -> str:
    """Median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:6.0f} ({low:.0f} to {high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("encodings", nargs="*", default=NAMES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    weights = (torch.randn(options.rows, options.columns, generator=random) * 0.02).bfloat16()
    chosen = {name: codecs.get(name) for name in options.encodings}
    packed = {name: codec.encode(weights) for name, codec in chosen.items()}
    print(f"{options.rounds} rounds of {options.rows} x {options.columns}; MB of bfloat16 per second and core")
    encoding: dict[str, list[float]] = {name: [] for name in chosen}
    decoding: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(options.rounds):
        for name, codec in chosen.items():
            encoding[name].append(speed(weights.nbytes, partial(codec.encode, weights)))
            decoding[name].append(speed(weights.nbytes, partial(codec.decode, packed[name], torch.bfloat16)))
    for name in chosen:
        print(f"{name}  encode {summary(encoding[name])}  decode {summary(decoding[name])}")


if __name__ == "__main__":
    main()
