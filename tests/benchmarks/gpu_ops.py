"""What single operations take on one card: products of a matrix with few vectors, fused operations, the vision tower.

    python tests/benchmarks/gpu_ops.py [--json FILE] [--only gemv,chain,fused,tower] [--dry]

Everything but the tower is timed inside a CUDA graph that goes through enough copies of its weights to find none of
them in the card's cache. Beside each figure stand the rates that a copy and a large product reach in the same run.
Results are compared with plain torch's before they are timed. Takes about a minute. `--dry` goes through it all on a
CPU, tiny and untimed, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from random_models import RandomCheckpoint, config_of, random_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pixtral_cli.model import fused, fused_triton, vision
from pixtral_cli.model.kernels import gemv_triton
from pixtral_cli.model.kernels.gemv_triton import Tile
from pixtral_cli.model.rotary import cos_sin

SHAPES = {
    "qkv": (6144, 5120),
    "o": (5120, 4096),
    "gate-up": (28672, 5120),
    "down": (5120, 14336),
    "head": (131072, 5120),
}
LAYER = ("qkv", "o", "gate-up", "down")
TINY = {"qkv": (96, 64), "o": (64, 64), "gate-up": (256, 64), "down": (64, 128), "head": (512, 64)}
BEYOND_CACHE = 400e6  # bytes of copies
REPLAYS, ROUNDS = 3, 5


class Bench:
    """The card, the sizes, and what was found."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.shapes = TINY if dry else SHAPES
        self.found: dict[str, Any] = {
            "card": "none" if dry else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0, scale)

    def in_graph(self, calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
        """Microseconds a call, all calls one after the other in one graph: the median of the rounds."""
        calls[0]()
        if self.dry:
            return 1.0
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return self.timed(graph.replay, replays) / len(calls)

    def timed(self, call: Callable[[], object], repeats: int = 1, rounds: int = ROUNDS) -> float:
        """Microseconds a call, as events on the card see it."""
        call()
        if self.dry:
            return 1.0
        times = []
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / repeats)
        return statistics.median(times)

    def copies(self, shape: tuple[int, int]) -> list[Tensor]:
        count = 1 if self.dry else max(1, -(-int(BEYOND_CACHE) // (2 * shape[0] * shape[1])))
        return [self.random(*shape, scale=0.02) for _ in range(count)]

    def rates(self) -> None:
        """What a copy and a matrix product reach."""
        size = 64 if self.dry else 8192
        a, b = self.random(size, size), self.random(size, size)
        self.found["matmul TF/s"] = round(2 * size**3 / self.timed(lambda: a @ b, 4) / 1e6, 1)
        source = torch.empty(4096 if self.dry else 2**31, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.found["copy TB/s"] = round(2 * source.nbytes / self.timed(lambda: target.copy_(source), 2) / 1e6, 3)
        print(f"copy {self.found['copy TB/s']} TB/s, matrix product {self.found['matmul TF/s']} TF/s")

    @contextmanager
    def chained(self, chained: bool) -> Iterator[None]:
        """Kernels begin before those before them have ended, or not."""
        with (
            replaced(fused_triton, "chains", lambda device: chained and not self.dry),
            replaced(gemv_triton, "chains", lambda device: chained and not self.dry),
        ):
            yield


@contextmanager
def replaced(module: Any, name: str, value: object) -> Iterator[None]:
    """As mock.patch, which keeps what its functions are called with: the card would fill up."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def plainly() -> Any:
    """Within it the operations are plain torch's."""
    return replaced(fused, "_on_card", lambda x: False)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


Product = Callable[[Tensor, Tensor], Tensor]


def right(variants: dict[Tile, Product], x: Tensor, weight: Tensor, dry: bool) -> dict[Tile, Product]:
    """Those that compile, several at a time, and give what torch gives."""

    def wrong(variant: Tile) -> str | None:
        try:
            off = error(variants[variant](x, weight), wanted)
        except Exception as failure:  # noqa: BLE001  the others are worth having
            return str(failure).splitlines()[0]
        return None if off < 1e-2 else f"wrong by {off:.1%}"

    wanted = linear(x, weight)
    first, *others = variants
    with ThreadPoolExecutor(1 if dry else 12) as threads:
        reasons = [wrong(first), *threads.map(wrong, others)]
    for variant, reason in zip(variants, reasons, strict=True):
        if reason:
            print(f"left out for {len(x)} rows: {variant}: {reason}")
    return {variant: variants[variant] for variant, reason in zip(variants, reasons, strict=True) if not reason}


def tiles(rows: int, dry: bool) -> list[Tile]:
    """To be tried for `rows` rows of x."""
    if dry:
        return [Tile(2, 64, 4, 3), Tile(4, 32, 4, 3)]
    shapes = (
        ((1, 1024, 2), (1, 2048, 2), (1, 2048, 4), (2, 512, 2), (2, 1024, 2), (2, 1024, 4), (4, 256, 2), (4, 1024, 4))
        if rows == 1
        else ((1, 1024, 4), (2, 256, 2), (2, 512, 4), (4, 256, 4), (4, 512, 8))
    )
    return [Tile(*shape, stages) for shape, stages in product(shapes, (2, 3, 4, 5, 6))]


Best = dict[tuple[str, int], Product]


def gemv(bench: Bench) -> Best:
    """Every tile for every matrix and number of rows -> the fastest product of each."""
    best: Best = {}
    variants: dict[int, dict[Tile, Product]] = {
        rows: {tile: partial(gemv_triton.products, tile=tile) for tile in tiles(rows, bench.dry)} for rows in (1, 2)
    }
    begun = time.perf_counter()
    small = bench.random(*bench.shapes["o"], scale=0.02)
    with bench.chained(False):
        for rows, each in variants.items():
            variants[rows] = right(each, bench.random(rows, small.shape[1]), small, bench.dry)
    print(f"{sum(map(len, variants.values()))} kernels compiled and right in {time.perf_counter() - begun:.0f} s")
    print("\nmatrix    rows   cuBLAS us (TB/s)   now us (TB/s)   the best tiles, chained")
    results = bench.found["gemv"] = {}
    for name, shape in bench.shapes.items():
        weights = bench.copies(shape)
        for rows in (1, 2, 4, 8, 16, 32, 64, 128):
            x, each = bench.random(rows, shape[1]), variants.get(rows, {})

            def us(call: Product) -> float:
                with bench.chained(True):
                    return bench.in_graph([partial(call, x, weight) for weight in weights], 2)  # noqa: B023

            def shown(us: float) -> str:
                return f"{us:7.1f} ({2 * shape[0] * shape[1] / us / 1e6:.2f})"  # noqa: B023

            times = sorted((round(us(call), 2), tile) for tile, call in each.items())
            cublas, now = us(linear), us(gemv_triton.products) if rows <= 2 else 0.0
            if times:
                best[name, rows] = each[times[0][1]]
            tell = [f"{shown(t)} {tuple(tile)}" for t, tile in times[:3]]
            print(f"{name:8s} {rows:5d} {shown(cublas)} {shown(now) if now else ''}  {'  '.join(tell)}", flush=True)
            results[f"{name} {rows}"] = {"cublas": cublas, "now": now, "times": [(t, *tile) for t, tile in times]}
    return best


def chain(bench: Bench, best: Best) -> None:
    """The products and element-wise operations of a decoder's layer, without its attention, in the engine's order."""
    copies = 1 if bench.dry else 4
    layers = [{name: bench.random(*bench.shapes[name], scale=0.02) for name in LAYER} for _ in range(copies)]
    width = bench.shapes["qkv"][1]
    nbytes = sum(2 * bench.shapes[name][0] * bench.shapes[name][1] for name in LAYER)
    norm = nn.RMSNorm(width, eps=1e-5, device=bench.device, dtype=torch.bfloat16).requires_grad_(False)
    results = bench.found["layer"] = {}

    print(f"\na layer without its attention, {nbytes / 1e6:.0f} MB: us (TB/s)")
    for rows in (1, 2, 4, 8, 64):
        x = bench.random(rows, width)
        mixed = bench.random(rows, bench.shapes["o"][1])

        def layer(weights: dict[str, Tensor], product_of: Callable[[str], Any], operations: Any) -> Tensor:
            total, normed = operations.add_norm(x, x, norm)  # noqa: B023
            product_of("qkv")(normed, weights["qkv"])
            delta = product_of("o")(mixed, weights["o"])  # noqa: B023
            _, normed = operations.add_norm(total, delta, norm)
            gate_up = product_of("gate-up")(normed, weights["gate-up"])
            return product_of("down")(operations.silu_mul(gate_up), weights["down"])

        variants: dict[str, tuple[Callable[[str], Any], Any, bool]] = {
            "cuBLAS, plain": (lambda name: linear, Plain, False),
            "cuBLAS, fused": (lambda name: linear, Fused, False),
            "cuBLAS, fused, chained": (lambda name: linear, Fused, True),
        }
        if rows <= 2:
            variants["now"] = (lambda name: gemv_triton.products, Fused, False)
            variants["now, chained"] = (lambda name: gemv_triton.products, Fused, True)
        if rows <= 2 and best:
            variants["best"] = (lambda name: best[name, rows], Fused, False)  # noqa: B023
            variants["best, chained"] = (lambda name: best[name, rows], Fused, True)  # noqa: B023
        wanted, tell = None, []
        for label, (product_of, operations, chained) in variants.items():
            with bench.chained(chained):
                result = layer(layers[0], product_of, operations)
                wanted = result if wanted is None else wanted
                assert error(result, wanted) < (5e-2 if bench.dry else 2e-2), (label, error(result, wanted))
                us = bench.in_graph([partial(layer, weights, product_of, operations) for weights in layers])
            results[f"{rows} rows, {label}"] = us
            tell.append(f"{label} {us:.1f} ({nbytes / us / 1e6:.2f})")
        print(f"{rows} rows: " + "; ".join(tell), flush=True)


class Plain:
    """The operations by plain torch."""

    @staticmethod
    def add_norm(x: Tensor, delta: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
        with plainly():
            return fused.add_norm(x, delta, norm)

    @staticmethod
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        with plainly():
            return fused.rotate(q, k, cos, sin)

    @staticmethod
    def silu_mul(gate_up: Tensor) -> Tensor:
        with plainly():
            return fused.silu_mul(gate_up)


class Fused:
    """The operations by Triton."""

    rotate = staticmethod(fused_triton.rotate)
    silu_mul = staticmethod(fused_triton.silu_mul)

    @staticmethod
    def add_norm(x: Tensor, delta: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
        return fused_triton.add_norm(x, delta, norm.weight, norm.eps or 0.0)


def fused_operations(bench: Bench) -> None:
    """Each at one token, 64 and 4096: plain torch, Triton, Triton chained, and what a copy's rate would take."""
    width, ffn = (64, 128) if bench.dry else (5120, 14336)
    heads, kv_heads, dim = (4, 2, 16) if bench.dry else (32, 8, 128)
    norm = nn.RMSNorm(width, eps=1e-5, device=bench.device, dtype=torch.bfloat16).requires_grad_(False)
    results = bench.found["fused"] = {}
    print("\noperation    tokens   plain us   Triton us   chained us   at the copy's rate")
    for tokens in (1, 64, 3 if bench.dry else 4096):
        x, delta, gate_up = (bench.random(tokens, size) for size in (width, width, 2 * ffn))
        qkv = bench.random(tokens, heads + 2 * kv_heads, dim)
        q, k, _ = qkv.split([heads, kv_heads, kv_heads], 1)
        rotary = cos_sin(torch.rand(tokens, dim // 2, device=bench.device), torch.bfloat16)
        calls = {
            "add_norm": (lambda of: of.add_norm(x, delta, norm)[1], 8 * x.numel()),  # noqa: B023
            "rotate": (lambda of: of.rotate(q, k, *rotary)[0], 4 * (q.numel() + k.numel())),  # noqa: B023
            "silu_mul": (lambda of: of.silu_mul(gate_up), 3 * gate_up.numel()),  # noqa: B023
        }
        for name, (call, nbytes) in calls.items():
            wanted = call(Plain)
            times = [bench.in_graph([partial(call, Plain)] * 20)]
            for chained in (False, True):
                with bench.chained(chained):
                    if name != "rotate":  # which turns its arguments on and on
                        assert error(call(Fused), wanted) < 1e-2, (name, tokens)
                    times.append(bench.in_graph([partial(call, Fused)] * 20))
            least = nbytes / bench.found["copy TB/s"] / 1e6
            print(
                f"{name:12s} {tokens:6d} {times[0]:10.1f} {times[1]:11.1f} {times[2]:12.1f} {least:20.1f}", flush=True
            )
            results[f"{name} {tokens}"] = [round(each, 2) for each in times]
        if not bench.dry:
            found = {}
            for warps in (4, 8, 16, 32):
                total, normed = torch.empty_like(x), torch.empty_like(x)
                call = partial(
                    fused_triton._add_norm[(tokens,)],
                    x, delta, norm.weight, total, normed, width, 1e-5, True, 8192, False, num_warps=warps,
                )  # fmt: skip
                found[warps] = round(bench.in_graph([call] * 20), 2)
            results[f"add_norm {tokens} by warps"] = found
            print(f"             add_norm by warps: {found}")


def attention(bench: Bench) -> None:
    """The tower's, within images of 4096 patches, by torch's backends; and what a size takes that is new to them."""
    heads, length, dim = (2, 16, 16) if bench.dry else (16, 4096, 64)
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    results = bench.found["attention"] = {}
    for images in (1, 4):
        flops = 4 * images * heads * length**2 * dim
        q, k, v = (x.transpose(1, 2) for x in bench.random(images, length, 3 * heads, dim).split(heads, 2))
        for name, backend in backends.items():
            try:
                with sdpa_kernel(backend):
                    begun = time.perf_counter()
                    float(scaled_dot_product_attention(q, k, v)[0, 0, 0, 0])
                    first = (time.perf_counter() - begun) * 1e3
                    us = bench.timed(partial(scaled_dot_product_attention, q, k, v), 3)
            except RuntimeError as failure:
                print(f"attention, {name}: {str(failure).splitlines()[0]}")
                continue
            results[f"{name} {images}"] = {"us": us, "TF/s": flops / us / 1e6, "first ms": first}
            print(f"attention, {images} images, {name}: {us:.0f} us, {flops / us / 1e6:.0f} TF/s, first {first:.0f} ms")


def picture_flops(config: Any, patches: int) -> int:
    """Multiplications and additions for one image: tower and projector."""
    tower, text = config.vision, config.text
    layer = 4 * tower.hidden_size**2 + 3 * tower.hidden_size * tower.intermediate_size
    ends = 3 * tower.patch_size**2 * tower.hidden_size + (tower.hidden_size + text.hidden_size) * text.hidden_size
    attention = 2 * patches * tower.hidden_size
    return 2 * patches * (tower.num_layers * (layer + attention) + ends)


@torch.inference_mode()
def tower(bench: Bench) -> None:
    """Eight pictures of 1024 x 1024 through 24 layers: by size of the chunks and by backend of attention."""
    print()
    attention(bench)
    config = config_of("tiny" if bench.dry else "nemo")
    text = replace(config.text, num_layers=1, vocab_size=1024, sliding_windows=(None,))
    config = replace(config, text=text)
    model = random_model(RandomCheckpoint(config, "bfloat16", bench.device), config)
    assert isinstance(model, vision.VisionLanguageModel)
    small = torch.randn(3, 128, 96)
    with plainly():
        plain = model.encode_image(small)
    found = model.encode_images([small, small])
    assert max(error(each, plain) for each in found) < 2e-2
    side = 64 if bench.dry else 1024
    here = [torch.randn(3, side, side) for _ in range(8)]
    there = [pixels.to(bench.device) for pixels in here]
    flops = picture_flops(config, (side // 16) ** 2)
    results = bench.found["tower"] = {}

    def tell(label: str, images: list[Tensor]) -> None:
        us = bench.timed(lambda: model.encode_images(images), 1, 3) / len(images)
        results[label] = {"ms a picture": us / 1e3, "TF/s": flops / us / 1e6}
        part = flops / us / 1e6 / bench.found["matmul TF/s"]
        print(f"tower, {label}: {us / 1e3:.2f} ms a picture, {flops / us / 1e6:.0f} TF/s, {part:.0%}", flush=True)

    tell("1 picture", there[:1])
    tell("8 pictures", there)
    tell("8 pictures from the computer's memory", here)
    few = [torch.randn(3, 256, 256, device=bench.device) for _ in range(8)]
    tell("1 of 256 x 256 (its work counted as if it were large)", few[:1])
    tell("8 of 256 x 256 (the same)", few)
    host(bench, results, lambda: model.encode_images(there[:1]))
    for limit in (8192, 32768):
        with replaced(vision, "PATCHES", limit):
            tell(f"8 pictures, {limit} patches at once", there)
    with bench.chained(False):
        tell("1 picture, not chained", there[:1])
        tell("8 pictures, not chained", there)
    with replaced(vision, "BACKENDS", [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
        tell("8 pictures, attention by cuDNN", there)
    with replaced(vision, "AttendWithinImages", lambda *_: lambda layer, q, k, v: q.contiguous()):
        tell("8 pictures without attention (its part of the work counted all the same)", there)
    with plainly():
        tell("8 pictures, plain torch operations", there)


def host(bench: Bench, results: dict[str, Any], call: Callable[[], object]) -> None:
    """What of the time is the host's, and what the card works on."""
    if bench.dry:
        return
    call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    launched = time.perf_counter() - begun
    torch.cuda.synchronize()
    whole = time.perf_counter() - begun
    results["host ms"] = [launched * 1e3, whole * 1e3]
    print(f"    1 picture: the host has launched all after {launched * 1e3:.1f} ms of {whole * 1e3:.1f}")
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        events = seen.key_averages()
    except RuntimeError as failure:
        print(f"    no profile: {str(failure).splitlines()[0]}")
        return
    for title, key in (("card", "self_device_time_total"), ("host", "self_cpu_time_total")):
        top = sorted(events, key=lambda event: getattr(event, key), reverse=True)[:9]
        total = sum(getattr(event, key) for event in events)
        rows = [(event.key[:44], event.count, round(getattr(event, key))) for event in top]
        results[f"profile, {title}"] = [total, *rows]
        print(f"    {title}, us, {total:.0f} in all: " + "; ".join(f"{name} {n}x {us}" for name, n, us in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="gemv,chain,fused,tower")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    bench, begun, best = Bench(options.dry), time.perf_counter(), {}
    parts: dict[str, Callable[[], object]] = {
        "tower": lambda: tower(bench),
        "fused": lambda: fused_operations(bench),
        "gemv": lambda: best.update(gemv(bench)),
        "chain": lambda: chain(bench, best),
    }
    bench.rates()
    for name, part in parts.items():
        if name in options.only.split(","):
            try:
                part()
            except Exception as failure:  # noqa: BLE001  the other parts are worth having
                print(f"{name} failed: {type(failure).__name__}: {failure}")
                bench.found[f"{name} failed"] = f"{type(failure).__name__}: {failure}"
            bench.found["seconds"] = round(time.perf_counter() - begun, 1)
            if options.json:
                options.json.write_text(json.dumps(bench.found, indent=1))
            print(f"[{bench.found['seconds']} s]")
            if not options.dry:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
