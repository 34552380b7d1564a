"""How fast the library in C reads weights as it multiplies: `python tests/benchmarks/cpu_kernels.py [--json FILE]`.

Products of 1, 4 and 8 vectors with matrices of real models, each encoding alone, on each set of instructions that is
asked for (by default the best of this machine). GB/s are of the weights' bytes, beside those of the fastest reader that
torch has, measured in the same rounds, in which all take turns. A turn goes over enough rows that no cache holds them:
as many copies of a matrix, one below the other. Printed are medians and spreads. Takes some minutes; `--encodings`,
`--shapes` and `--vectors` choose.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import time
from pathlib import Path

import torch
from measured import Table

from pixtral_cli.bench.ceilings import Ceilings
from pixtral_cli.bench.random_weights import random_weight
from pixtral_cli.bench.report import machine
from pixtral_cli.bench.runs import SETTLING
from pixtral_cli.bench.shapes import ENCODINGS
from pixtral_cli.model.kernels import native
from pixtral_cli.model.kernels.cpu_rows import CpuRowsKernel, Together
from weights_cache.encodings import ENCODINGS as ALL
from weights_cache.formats.reader import TensorInfo

CPU = torch.device("cpu")
SHAPES = {
    "gate_up of 1.5 B": (16384, 2048),
    "down of 1.5 B": (2048, 8192),
    "qkv of 12 B": (6144, 5120),
    "down of 12 B": (5120, 14336),
}
VECTORS = (1, 4, 8)
GB = 1e9
CACHED = 2**28  # bytes that no cache holds
ASKED = {"q4_0": 0.85, "q4_k": 0.85}
"""Of reading, of one vector."""


class Copies:
    """Copies of a random matrix, one below the other."""

    def __init__(self, shape: tuple[int, int], encoding: str) -> None:
        (rows, self.columns), kind = shape, ALL[encoding]
        rows *= -(-CACHED // (rows * kind.row_bytes(self.columns)))
        self.nbytes = rows * kind.row_bytes(self.columns)
        info = TensorInfo("weight", kind.word, (rows, self.columns), self.nbytes, Path("random"), encoding)
        self._multiply = Together([CpuRowsKernel(random_weight(info), CPU)]).few
        self._dtype = torch.float32 if encoding == "float32" else torch.bfloat16

    def rate(self, instructions: str, vectors: int) -> float:
        """GB/s of one product."""
        native.function("pixtral_use_instructions", ctypes.c_int)(native.INSTRUCTIONS.index(instructions))
        x = torch.randn(vectors, self.columns).to(self._dtype)
        time.sleep(SETTLING)
        begun = time.perf_counter()
        self._multiply(x)
        return self.nbytes / (time.perf_counter() - begun) / GB


def measure(table: Table, name: str, options: argparse.Namespace, ceilings: Ceilings) -> None:
    """The rows of one shape, after rounds of which the first does not count."""
    copies = {encoding: Copies(SHAPES[name], encoding) for encoding in options.encodings}
    turns = list(itertools.product(copies, options.instructions, options.vectors))
    rounds = []
    for _ in range(1 + options.rounds):
        read = ceilings.read() / GB
        rounds.append((read, [copies[encoding].rate(*how) for encoding, *how in turns]))
    reads, rates = zip(*rounds[1:], strict=True)
    read = statistics.median(reads)
    for (encoding, instructions, vectors), found in zip(turns, zip(*rates, strict=True), strict=True):
        share = ASKED.get(encoding) if (vectors, instructions) == (1, native.instructions()) else None
        asked = None if share is None else (share * read, f"{share:.0%} of reading")
        table.add(f"{name}, {instructions}", encoding, 1, vectors, list(found), "GB/s", read, asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=list(ENCODINGS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--vectors", nargs="+", type=int, default=list(VECTORS))
    parser.add_argument("--instructions", nargs="+", choices=native.INSTRUCTIONS, default=[native.instructions()])
    options = parser.parse_args()
    best = native.instructions()
    if not native.available():
        parser.error(str(native.why_not()))
    if any(native.INSTRUCTIONS.index(each) > native.INSTRUCTIONS.index(best) for each in options.instructions):
        parser.error(f"this machine has no more than {best}")
    torch.set_num_threads(options.threads)
    native.set_threads(options.threads)
    processor, ceilings = machine()["processor"], Ceilings(CPU)
    table = Table(options.json, f"{processor}, {options.threads} threads", torch.__version__)
    for name in options.shapes:
        measure(table, name, options, ceilings)


if __name__ == "__main__":
    main()
