"""How fast packed weights are multiplied with on a card: `python tests/benchmarks/gpu_packed.py [--json FILE]`.

First every product is compared with the decoded weight. Then the matrices of a 12 B NeMo are timed inside a CUDA graph
that goes over more copies than the cache of the card holds. TB/s are of packed bytes, but for decoding, where the
bfloat16 numbers that are written count as well. Takes about a minute; `--seconds` is when the sweep of launches ends.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pixtral_cli.model.card_bits import UNIT_BYTES
from pixtral_cli.model.kernels import cuda_packed, nvrtc
from pixtral_cli.model.kernels.cuda_packed import DECODED_FROM, SLICES, CudaPackedKernel, Launch
from weights_cache.codecs.fp8 import FP8
from weights_cache.codecs.nf4 import NF4
from weights_cache.encodings import ENCODINGS
from weights_cache.packed import PackedRows

SHAPES = {
    "qkv": (6144, 5120),
    "o": (5120, 4096),
    "gate_up": (28672, 5120),
    "down": (5120, 14336),
    "head": (131072, 5120),
}
SWEPT = ("q4_k", "q6_k", "q8_0", "fp8", "nf4", "q4_0")
FACTORS = {
    "q4_0": [(0, 2)],
    "q4_k": [(0, 2), (2, 4)],
    "q5_k": [(0, 2), (2, 4)],
    "q6_k": [(208, 210)],
    "q8_0": [(0, 2)],
}  # float16, in a block
CACHED = 200 * 2**20  # bytes that no cache of a card holds
CARD = torch.device("cuda", 0)


def random_weight(encoding: str, rows: int, columns: int) -> PackedRows | NF4 | FP8:
    """Random codes and small scales, made on the card."""
    if encoding == "fp8":
        codes = torch.randint(0, 127, (rows, columns), dtype=torch.uint8, device=CARD)
        return FP8(codes, torch.rand(rows, 1, device=CARD) * 1e-4)
    if encoding == "nf4":
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=CARD)
        return NF4(codes, torch.rand(rows * columns // 64, device=CARD) * 0.05)
    kind = ENCODINGS[encoding]
    data = torch.randint(0, 256, (rows, columns // kind.block, kind.block_bytes), dtype=torch.uint8, device=CARD)
    for first, end in FACTORS[encoding]:
        factor = torch.rand(rows, columns // kind.block, 1, device=CARD) * 0.01
        data[..., first:end] = factor.half().view(torch.uint8)
    return PackedRows(encoding, data.flatten(1))


def graph_time(calls: Sequence[Callable[[], object]], rounds: int = 3) -> float:
    """Microseconds for each of the calls, captured one after the other in one graph: the best of some replays."""
    stream, graph, found = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph.capture_begin()  # torch.cuda.graph collects garbage each time, which takes longer than all the rest
        for call in calls:
            call()
        graph.capture_end()
        for _ in range(rounds + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1000 / len(calls))
    return min(found[1:])


class Matrices:
    """Copies of a matrix in an encoding, with bytes that mean nothing: enough of them that none is cached."""

    def __init__(self, encoding: str, shape: tuple[int, int], pool: Tensor) -> None:
        first = CudaPackedKernel(random_weight(encoding, 64, shape[1]), CARD)
        first.shape = shape
        for most in SLICES:
            first.use(most, cuda_packed.launch_for(encoding, *shape, most, nvrtc.card(CARD)))
        units = (shape[0] // 16, shape[1] // 256, UNIT_BYTES[encoding])
        self.nbytes = units[0] * units[1] * units[2]
        count = min(max(2, -(-CACHED // self.nbytes)), pool.numel() // self.nbytes)
        self.kernels = []
        for part in pool[: count * self.nbytes].view(count, *units):
            kernel = copy.copy(first)
            kernel._units, kernel._few = part, dict(first._few)
            self.kernels.append(kernel)

    def launch(self, most: int) -> Launch:
        return self.kernels[0]._few[most].launch

    def use(self, most: int, launch: Launch) -> None:
        for kernel in self.kernels:
            kernel.use(most, launch)

    def time(self, rows: int, product: int = 1) -> float:
        x = torch.randn(rows, self.kernels[0].shape[1], dtype=torch.bfloat16, device=CARD)
        again = max(1, -(-2000 // (len(self.kernels) * max(5, self.nbytes // 2_000_000))))  # some milliseconds
        return graph_time([partial(kernel.products[product], x) for kernel in self.kernels] * again)


def check(encoding: str) -> dict[str, float]:
    """The largest relative error for some numbers of rows, and how many weights and bytes come back wrong."""
    weight = random_weight(encoding, 1040, 5120)
    kernel, found = CudaPackedKernel(weight, CARD), {}
    exact, rounded = weight.decoded().double(), torch.empty(1040, 5120, dtype=torch.bfloat16, device=CARD)
    kernel.decode(0, 1040, rounded)
    same = rounded == weight.decoded(torch.bfloat16)
    found["wrongly decoded"] = float((~same).sum())
    for part, other in zip(weight.tensors().values(), kernel.weight.tensors().values(), strict=True):
        found["wrong bytes"] = found.get("wrong bytes", 0) + float((part != other).sum())
    for rows in (1, 2, 7, 8, 9, 16, 17, 64, 130):
        x = torch.randn(rows, 5120, device=CARD).bfloat16()
        wanted = x.double() @ exact.T
        for least, product in kernel.products.items():
            if rows >= least:
                error = float((product(x).double() - wanted).norm() / wanted.norm())
                found["error"] = max(found.get("error", 0.0), error)
    return found


def launches(encoding: str, columns: int, most: int) -> list[Launch]:
    """What is tried."""
    units, card = columns // 256, nvrtc.card(CARD)
    found = []
    for tiles in (1, 2):
        for stages in (2, 3):
            for warps in (2, 4, 5, 7, 8, 10, 14, 16):
                each = Launch(tiles, stages, warps)
                shared = each.shared(encoding, most)
                if units % warps or shared > card.shared_per_block:
                    continue
                resident = min(card.shared_per_processor // (shared + 1024), 48 // warps)
                found.append(each)
                if resident and (encoding == "nf4" or (tiles, stages) == (1, 2)):
                    found.append(each._replace(per_processor=resident))
    return found


def compile_all() -> None:
    """All that the sweeps need, by all processors at once: it is found in the cache afterwards."""
    source = Path(cuda_packed.__file__).with_name("packed_matmul.cu").read_text()
    wanted = [
        cuda_packed.macros(encoding, Launch(tiles, stages, 1), most)
        for stages, tiles, most, encoding in itertools.product((2, 3), (1, 2), (1, 8, 16), (*SWEPT, "q5_k"))
        if tiles == 1 or most < 16
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda options: nvrtc.compiled(source, options, nvrtc.card(CARD).sm), wanted))


def sweep(matrices: Matrices, encoding: str, rows: int, deadline: float) -> dict[Launch, float]:
    """Microseconds of each launch; the default one is the first."""
    found: dict[Launch, float] = {}
    for launch in [matrices.launch(rows), *launches(encoding, matrices.kernels[0].shape[1], rows)]:
        if found and time.monotonic() > deadline:
            break
        matrices.use(rows, launch)
        found[launch] = matrices.time(rows)
    return found


def plain(shape: tuple[int, int], rows: int) -> float:
    """cuBLAS in bfloat16."""
    count = max(2, -(-CACHED // (2 * shape[0] * shape[1])))
    weights = torch.randn(count, *shape, dtype=torch.bfloat16, device=CARD)
    x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device=CARD)
    return graph_time([partial(torch.nn.functional.linear, x, weight) for weight in weights] * 4)


def bandwidth() -> float:
    """TB/s of a copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device=CARD)
    target = torch.empty_like(source)
    return 2 * source.nbytes / graph_time([lambda: target.copy_(source)] * 4) / 1e6


class Report:
    """What was found, written to a file each time that something is added to it."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[str, object] = {}

    def keep(self, name: str, value: object) -> None:
        self._found[name] = value
        if self._path is not None:
            self._path.write_text(json.dumps(self._found))


def report_checks(report: Report) -> None:
    for encoding in UNIT_BYTES:
        started = time.monotonic()
        found = check(encoding)
        print(f"check {encoding}: {found}, {time.monotonic() - started:.1f} s with compiling")
        report.keep(f"check {encoding}", found)


def report_few(report: Report, pool: Tensor) -> None:
    print("\nmicroseconds (TB/s) for 1 row, microseconds for 8")
    print(" " * 16 + "".join(f"{name:>24}" for name in SHAPES) + "   ms a token")

    def line(name: str, times: dict[str, list[float]], bits: float) -> None:
        cells = ""
        for shape, (one, eight) in times.items():
            rows, columns = SHAPES[shape]
            cells += f"{one:10.1f} ({rows * columns * bits / 8 / one / 1e6:.2f}) {eight:6.1f}"
        token = (40 * sum(times[shape][0] for shape in list(SHAPES)[:4]) + times["head"][0]) / 1000
        print(f"{name:16}{cells}  {token:.2f}")
        report.keep(name, times)

    line("cuBLAS bfloat16", {name: [plain(shape, rows) for rows in (1, 8)] for name, shape in SHAPES.items()}, 16)
    for encoding, nbytes in UNIT_BYTES.items():
        times = {}
        for name, shape in SHAPES.items():
            matrices = Matrices(encoding, shape, pool)
            times[name] = [matrices.time(rows) for rows in (1, 8)]
        line(encoding, times, nbytes * 8 / 4096)


def report_decoding(report: Report, pool: Tensor) -> None:
    rows, columns = 26208, 5120  # what the buffer holds
    print(f"\ndecoding {rows} x {columns}, microseconds (TB/s read and written)")
    for encoding in UNIT_BYTES:
        matrices = Matrices(encoding, (rows, columns), pool)
        out = matrices.kernels[0]._buffer[: rows * columns].view(rows, columns)
        took = graph_time([partial(kernel.decode, 0, rows, out) for kernel in matrices.kernels] * 4)
        print(f"  {encoding} {took:.1f} ({(matrices.nbytes + out.nbytes) / took / 1e6:.2f})", end="")
        report.keep(f"decode {encoding}", took)


def report_many(report: Report, pool: Tensor) -> None:
    print("\n\nmany rows, microseconds: slices / decoded and cuBLAS")
    some = [("q4_k", "gate_up"), ("q4_k", "down"), ("q4_k", "qkv"), ("q4_k", "head"), ("q6_k", "gate_up")]
    for encoding, name in some:
        matrices, cells = Matrices(encoding, SHAPES[name], pool), []
        for rows in (16, 32, 64, 128, 256):
            few, many = matrices.time(rows), matrices.time(rows, DECODED_FROM)
            cells.append(f"{rows}: {few:.0f} / {many:.0f}")
            report.keep(f"many {encoding} {name} {rows}", [few, many])
        print(f"  {encoding} {name:8}", "   ".join(cells))


def report_sweeps(report: Report, pool: Tensor, deadline: float) -> None:
    print("\nlaunches (tiles, stages, warps, per processor): default; best")
    for encoding in SWEPT:
        for name, shape in SHAPES.items():
            for rows in (1, 8):
                if time.monotonic() > deadline:
                    return
                times = sweep(Matrices(encoding, shape, pool), encoding, rows, deadline)
                report.keep(f"sweep {encoding} {name} {rows}", [[*each, round(t, 2)] for each, t in times.items()])
                default, *_ = times
                best = sorted(times, key=times.__getitem__)[:4]
                cells = ", ".join(f"{tuple(each)} {times[each]:.1f}" for each in best)
                print(f"  {encoding} {name:8} {rows}  {tuple(default)} {times[default]:.1f}; {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=50)
    options = parser.parse_args()
    begun = time.monotonic()
    report = Report(options.json)
    name = f"{torch.cuda.get_device_name(CARD)}, {nvrtc.card(CARD)}, torch {torch.__version__}, NVRTC {nvrtc.version()}"
    copied = bandwidth()
    print(f"{name}\ncopy {copied:.2f} TB/s")
    report.keep("card", name)
    report.keep("copy", copied)
    started = time.monotonic()
    compile_all()
    print(f"compiled in {time.monotonic() - started:.1f} s")
    report_checks(report)
    pool = torch.randint(0, 256, (2**30,), dtype=torch.uint8, device=CARD)
    report_few(report, pool)
    report_decoding(report, pool)
    report_many(report, pool)
    report_sweeps(report, pool, begun + options.seconds)
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
