"""What attention over pages costs on this card: decoding and prefill, with 16 and 8 bits a number.

    python tests/benchmarks/gpu_attention.py [--json FILE] [--no-sweep] [--rehearse]

Shapes are NeMo's: 32 heads of 128, 8 key heads, 40 layers, each with pages of its own, strewn over the store. First
the kernels' numbers against plain attention. Then each time is that of one layer inside one CUDA graph; decoding is
given as the keys and values that it reads a second, next to the card's copy, prefill as causal multiplications and
additions counted once. `--rehearse` runs tiny shapes in Triton's interpreter on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pixtral_cli.model import paged_attention
from pixtral_cli.model.attention import AttendOnCard, AttendPaged, Layout, Span
from pixtral_cli.model.config import TextConfig
from pixtral_cli.model.kv_cache import KVCache, pages_for
from pixtral_cli.model.paged_attention import Blocks

HEADS, KV_HEADS, DIM, LAYERS = 32, 8, 128, 40
SECONDS = 55  # after which nothing new begins
DECODE = [(1, 128), (1, 4096), (1, 32768), (8, 4096), (64, 512), (64, 4096)]
PREFILL = {  # new tokens after cached ones of each sequence, window
    "4096 fresh": ([4096], [0], None),
    "512 fresh": ([512], [0], None),
    "1024 after 3072": ([1024], [3072], None),
    "8 of 512": ([512] * 8, [0] * 8, None),
    "64 of 40 after 500": ([40] * 64, [500] * 64, None),
    "4096, window 1024": ([4096], [0], 1024),
}
DECODE_SWEEP = [  # keys, warps, stages, programs a processor, blocks worth a program; the kernel's own comes before
    (64, 4, 3, 2, 1), (64, 4, 3, 2, 4), (64, 4, 4, 2, 2), (64, 8, 3, 2, 2), (128, 4, 2, 2, 1), (32, 2, 4, 4, 4),
]  # fmt: skip
PREFILL_SWEEP = [(128, 64, 8, 4), (64, 64, 4, 3), (64, 32, 4, 4), (128, 128, 8, 3)]
CODED_DECODE_SWEEP = [(128, 4, 3, 2, 1)]
CODED_PREFILL_SWEEP = [(64, 64, 4, 3)]


def config(layers: int = LAYERS, window: int | None = None) -> TextConfig:
    return TextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=layers, num_heads=HEADS, num_kv_heads=KV_HEADS,
        head_dim=DIM, norm_eps=1e-5, rope_theta=1e6, max_length=2**17, sliding_windows=(window,) * layers,
        tied_embeddings=False,
    )  # fmt: skip


def layout(pages: list[list[int]], new: list[int], before: list[int], decoding: int, device: torch.device) -> Layout:
    def on_card(numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    longest = max(map(len, pages))
    starts = [sum(new[decoding:at]) for at in range(decoding, len(new) + 1)]
    return Layout(
        page_table=on_card([each + [0] * (longest - len(each)) for each in pages]),
        rows=on_card([row for row, count in enumerate(new) for _ in range(count)]),
        positions=on_card([past + n for past, count in zip(before, new, strict=True) for n in range(count)]),
        decoding=decoding,
        prefill_rows=on_card(list(range(decoding, len(new)))),
        before=on_card(before[decoding:]),
        starts=on_card(starts),
    )


def strewn(counts: list[int], pool: int, seed: int = 0) -> list[list[int]]:
    """Pages for sequences of so many tokens, anywhere in the pool."""
    order = torch.randperm(pool, generator=torch.Generator().manual_seed(seed)).tolist()
    needed = [pages_for(count) for count in counts]
    ends = [sum(needed[: at + 1]) for at in range(len(needed))]
    return [[order[n] for n in range(end - count, end)] for end, count in zip(ends, needed, strict=True)]


def filled(of: TextConfig, dtype: torch.dtype, device: torch.device, pages: int, codes: str) -> KVCache:
    """A store of random numbers."""
    kv_cache = KVCache(of, dtype, device, pages, codes)
    for layer in range(of.num_layers):
        keys, values, *exponents = kv_cache.layer(layer)
        for store in (keys, values):
            store.random_(0, 0x70) if codes == "fp8" else store.normal_()
        for each in exponents:
            if each is not None:
                each.fill_(-8)
    return kv_cache


def random_qkv(tokens: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Views into one matrix, as the joined projection gives them."""
    generator = torch.Generator(device).manual_seed(tokens)
    sizes = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
    joined = torch.randn(tokens, sum(sizes), generator=generator, device=device, dtype=dtype)
    return [x.unflatten(1, (-1, DIM)) for x in joined.split(sizes, 1)]


# ---- correctness ------------------------------------------------------------------------------------------------


def check(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """(name, largest difference, allowed difference) of the kernels from plain attention over the same store."""
    cases = {  # new tokens, cached ones, how many decode
        "decode": ([1] * 5, [0, 15, 64, 700, 6000], 5),
        "prefill": ([300, 1, 70], [0, 130, 33], 0),
        "both": ([1, 1, 90, 40], [200, 31, 0, 17], 2),
    }
    half = torch.float32 if device.type == "cpu" else torch.bfloat16  # Triton's interpreter cannot multiply bfloat16
    for dtype, codes, window, allowed in [
        (half, "auto", None, 2e-2),
        (half, "fp8", 100, 2e-2),
        (torch.float32, "auto", 100, 2e-5),
    ]:
        of = config(1, window)
        for name, (new, before, decoding) in cases.items():
            pages = strewn([a + b for a, b in zip(new, before, strict=True)], 500)
            q, k, v = random_qkv(sum(new), dtype, device)
            spans = [Span(*each) for each in zip(pages, before, new, strict=True)]
            found, wanted = (filled_alike(of, dtype, device, 500, codes) for _ in range(2))
            mixed = AttendOnCard(of, found, layout(pages, new, before, decoding, device))(0, q, k, v)
            plain = AttendPaged(of, wanted, spans, device)(0, q, k, v)
            where = f"{name} {str(dtype)[6:]} {codes} window {window}"
            yield where, (mixed.float() - plain.float()).abs().max().item(), allowed
            same = all(a is None or torch.equal(a, b) for a, b in zip(found.layer(0), wanted.layer(0), strict=True))
            yield f"{where}: store", 0.0 if same else 1.0, 0.0
    if device.type == "cuda":
        yield "a graph replayed with other lengths", replayed(device), 2e-2


def filled_alike(*arguments) -> KVCache:
    torch.manual_seed(1)
    return filled(*arguments)


def replayed(device: torch.device) -> float:
    """A decoding step captured with short sequences, then replayed with long ones and with rows for nobody."""
    of, before = config(1), [3000, 17, 0, 900]
    pages = strewn([count + 1 for count in before], 400)
    q, k, v = random_qkv(len(before), torch.bfloat16, device)
    found, wanted = (filled_alike(of, torch.bfloat16, device, 400, "auto") for _ in range(2))
    wide = layout(pages, [1] * 4, before, 4, device)
    static = replace(wide, positions=torch.zeros_like(wide.positions), rows=torch.zeros_like(wide.rows))
    attend = AttendOnCard(of, found, static)
    graph, out = captured(lambda: attend(0, q, k, v))
    static.positions.copy_(wide.positions)
    static.rows.copy_(wide.rows)
    for _ in range(3):
        graph.replay()
    plain = AttendPaged(of, wanted, [Span(*each, 1) for each in zip(pages, before, strict=True)], device)(0, q, k, v)
    return (out.float() - plain.float()).abs().max().item()


# ---- time -------------------------------------------------------------------------------------------------------


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def microseconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Of one of the `calls` that `run` makes, inside a CUDA graph; the median of five replays."""
    if device.type == "cpu":
        run()
        return 1.0
    graph, _ = captured(run)
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return sorted(times[1:])[2]


def copy_rate(device: torch.device) -> float:
    """Bytes a second read and written by a copy of 2 GB."""
    if device.type == "cpu":
        return 1e9
    x = torch.ones(2**30, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / microseconds(lambda: torch.neg(x, out=y), 1, device) * 1e6


def time_decode(kv_cache: KVCache, of: TextConfig, batch: int, length: int, pool: int, device, variant) -> float:
    keys, warps, stages, per_processor, least = variant
    pages = strewn([length] * batch, pool)
    where = layout(pages, [1] * batch, [length - 1] * batch, batch, device)
    q, k, v = random_qkv(batch, kv_cache.dtype, device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    processors = paged_attention.card(device).programs // paged_attention.PROGRAMS_PER_PROCESSOR
    scratch = paged_attention.scratch(HEADS, KV_HEADS, DIM, device, max(processors, 1) * per_processor)

    def run() -> Tensor:
        for layer in range(of.num_layers):
            paged_attention.decode(q, k, v, out, kv_cache, layer, where, None, scratch, Blocks(16, keys, warps, stages))
        return out

    with patch.object(paged_attention, "LEAST_BLOCKS", least):
        return microseconds(run, of.num_layers, device)


def time_prefill(kv_cache: KVCache, new, before, window, pool: int, device, blocks: tuple) -> float:
    pages = strewn([a + b for a, b in zip(new, before, strict=True)], pool)
    where = layout(pages, new, before, 0, device)
    q, _, _ = random_qkv(sum(new), kv_cache.dtype, device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    layers = 4

    def run() -> Tensor:
        for layer in range(layers):
            paged_attention.prefill(q, out, kv_cache, layer, where, window, Blocks(*blocks))
        return out

    return microseconds(run, layers, device)


def time_write(kv_cache: KVCache, tokens: int, pool: int, device) -> float:
    where = layout(strewn([tokens], pool), [tokens], [0], 0, device)
    _, k, v = random_qkv(tokens, kv_cache.dtype, device)

    def run() -> Tensor:
        for layer in range(4):
            paged_attention.write(k, v, kv_cache, layer, where, first=0)
        return k

    return microseconds(run, 4, device)


def time_sdpa(batch: int, tokens: int, backend: SDPBackend, device) -> tuple[float, float]:
    """(microseconds, milliseconds of the first call with a length never seen)."""
    q, k, v = (
        x.view(batch, tokens, -1, DIM).transpose(1, 2)
        for x in map(Tensor.contiguous, random_qkv(batch * tokens, torch.bfloat16, device))
    )

    def run(skip: int = 0) -> Tensor:
        cut = (x[:, :, skip:] for x in (q, k, v))
        return scaled_dot_product_attention(*cut, is_causal=True, enable_gqa=True)

    with sdpa_kernel(backend):
        run()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run(skip=3)
        torch.cuda.synchronize()
        first = 1e3 * (time.perf_counter() - begun)
        return microseconds(lambda: [run() for _ in range(4)][-1], 4, device), first


def pairs_seen(new: list[int], before: list[int], window: int | None) -> int:
    """Pairs of a query and a key that it sees, of one head."""
    most = window or 2**60
    return sum(min(past + n + 1, most) for count, past in zip(new, before, strict=True) for n in range(count))


# ---- the table --------------------------------------------------------------------------------------------------


class Report:
    def __init__(self) -> None:
        self.found: dict = {"failed": []}
        self.begun = time.perf_counter()

    def tried(self, run: Callable, *arguments) -> Any:
        """What it gives; None if it fails or comes too late."""
        name = f"{run.__name__} {[each for each in arguments if isinstance(each, int | tuple | list)]}"
        if time.perf_counter() - self.begun > SECONDS:
            self.found["failed"].append(f"{name}: no time left")
            return None
        try:
            return run(*arguments)
        except Exception as error:  # noqa: BLE001 - one variant that fails must not cost the others
            self.found["failed"].append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            return None

    def line(self, text: str) -> None:
        print(f"{time.perf_counter() - self.begun:5.1f} s  {text}", flush=True)


def measure_decode(report: Report, device: torch.device, codes: str, sweep: list, shapes: list, copy: float) -> None:
    of = config(2 if device.type == "cpu" else LAYERS)
    pool = max(batch * pages_for(length) for batch, length in shapes)
    kv_cache = filled(of, torch.bfloat16 if device.type == "cuda" else torch.float32, device, pool, codes)
    token = KV_HEADS * 2 * (DIM + 1 if codes == "fp8" else 2 * DIM)
    rows = report.found.setdefault(f"decode {codes}", {})
    report.line(f"decode {codes}: us a layer; columns are keys/warps/stages/programs/least")
    report.line(
        f"{'':14}"
        + "".join(f"{'/'.join(map(str, each)):>11}" for each in sweep)
        + "   best TB/s, of copy; the first, not chained"
    )
    for batch, length in shapes:
        times = [report.tried(time_decode, kv_cache, of, batch, length, pool, device, each) for each in sweep]
        best = min((each for each in times if each), default=float("nan"))
        with patch.object(paged_attention, "chains", lambda device: False):
            alone = report.tried(time_decode, kv_cache, of, batch, length, pool, device, sweep[0])
        rate = batch * (length - 1) * token / best * 1e6
        found = {**dict(zip(map(str, sweep), times, strict=True)), "not chained": alone}
        rows[f"{batch}x{length}"] = {"us": found, "bytes_per_s": rate}
        shown = "".join(f"{each:11.1f}" if each else f"{'-':>11}" for each in times)
        report.line(
            f"{batch:3} x {length:6}  {shown}   {rate / 1e12:5.2f}  {100 * rate / copy:.0f} %"
            + (f"   {alone:.1f}" if alone else "")
        )


def measure_prefill(report: Report, device: torch.device, codes: str, sweep: list, shapes: dict) -> None:
    of = config(4)
    pool = max(sum(map(pages_for, map(sum, zip(new, before, strict=True)))) for new, before, _ in shapes.values())
    kv_cache = filled(of, torch.bfloat16 if device.type == "cuda" else torch.float32, device, pool, codes)
    rows = report.found.setdefault(f"prefill {codes}", {})
    report.line(f"prefill {codes}: TF/s; columns are rows/keys/warps/stages")
    report.line(f"{'':20}" + "".join(f"{'/'.join(map(str, each)):>12}" for each in sweep) + "   best us")
    for name, (new, before, window) in shapes.items():
        flops = 4 * HEADS * DIM * pairs_seen(new, before, window)
        tried = sweep[:1] if window else sweep  # another kernel to compile
        times = [report.tried(time_prefill, kv_cache, new, before, window, pool, device, each) for each in tried]
        best = min((each for each in times if each), default=float("nan"))
        rows[name] = {"us": dict(zip(map(str, tried), times, strict=True)), "flops_per_s": flops / best * 1e6}
        shown = "".join(f"{flops / each / 1e6:12.0f}" if each else f"{'-':>12}" for each in times)
        report.line(f"{name:20}{shown}   {best:.0f}")
    for tokens in (1, 4096 if device.type == "cuda" else 5):
        spent = report.tried(time_write, kv_cache, tokens, pool, device)
        rows[f"write {tokens}"] = {"us": spent}
        report.line(f"write {tokens}: {spent:.1f} us" if spent else f"write {tokens}: -")


def measure_sdpa(report: Report, device: torch.device) -> None:
    rows = report.found.setdefault("sdpa", {})
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for batch, tokens in ((1, 4096), (8, 512)):
            name = f"{backend.name.split('_')[0].lower()} {batch} of {tokens}"
            found = report.tried(time_sdpa, batch, tokens, backend, device)
            if found:
                spent, first = found
                rate = 4 * HEADS * DIM * pairs_seen([tokens] * batch, [0] * batch, None) / spent * 1e6
                rows[name] = {"us": spent, "flops_per_s": rate, "first_call_ms": first}
                report.line(f"sdpa {name}: {spent:.0f} us, {rate / 1e12:.0f} TF/s; a new length {first:.1f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-sweep", action="store_true", help="the kernels' own choice of blocks only")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.rehearse else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --rehearse needs none")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    decode, prefill = DECODE, PREFILL
    if options.rehearse:
        globals().update(HEADS=4, KV_HEADS=2, DIM=16)
        decode, prefill = [(2, 40)], {"tiny": ([20, 3], [0, 17], 9)}
    report = Report()
    report.found |= {"device": name, "torch": torch.__version__}
    wrong = 0
    with torch.inference_mode():
        for where, difference, allowed in check(device):
            bad = not difference <= allowed
            wrong += bad
            report.found.setdefault("differences", {})[where] = difference
            if bad or ": store" not in where:
                report.line(f"{'WRONG' if bad else 'right'} {difference:.1e}  {where}")
        copy = copy_rate(device)
        report.found["copy_bytes_per_s"] = copy
        report.line(f"{name}, torch {torch.__version__}: copy {copy / 1e12:.2f} TB/s")
        shared = paged_attention.card(device).shared
        own = paged_attention.decode_blocks(torch.bfloat16, DIM, shared)
        own_decode = (*own[1:], paged_attention.PROGRAMS_PER_PROCESSOR, paged_attention.LEAST_BLOCKS)
        own_prefill = tuple(paged_attention.prefill_blocks(torch.bfloat16, DIM, shared))
        for codes, decode_sweep, prefill_sweep in (
            ("auto", DECODE_SWEEP, PREFILL_SWEEP),
            ("fp8", CODED_DECODE_SWEEP, CODED_PREFILL_SWEEP),
        ):
            if options.no_sweep:
                decode_sweep, prefill_sweep = [], []  # noqa: PLW2901
            measure_decode(report, device, codes, list(dict.fromkeys([own_decode, *decode_sweep])), decode, copy)
            measure_prefill(report, device, codes, list(dict.fromkeys([own_prefill, *prefill_sweep])), prefill)
            if device.type == "cuda" and codes == "auto":
                measure_sdpa(report, device)
    for each in report.found["failed"]:
        report.line(f"failed: {each}")
    if options.json:
        options.json.write_text(json.dumps(report.found, indent=1))
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
