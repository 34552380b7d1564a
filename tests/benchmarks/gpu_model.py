"""What the whole engine does on one card, beside what the card's memory and matrix units allow in the same run.

    python tests/benchmarks/gpu_model.py [--json FILE] [--only PART,PART] [--quick] [--seconds S]
                                         [--shape nemo|tiny] [--device cuda|cpu]

The model is Pixtral-12B with random weights (random_models.py): no network, no checkpoint. Each figure is the
median of several rounds, beside the smallest and the largest. A row is printed, and written to FILE, as soon as it is
measured; a measurement that fails tells why in a line, and the others go on; what does not fit into S seconds is told.

The limit of decoding is what memory allows: every weight, and every key and value, is read once a step, at the rate of
a copy of 4 GiB (bytes read and bytes written). That of prefill and of pictures is the rate of a bfloat16 matrix
product.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import engine_rates
import torch
from measured import Table, today
from random_models import SHAPES, SPOKEN, RandomCheckpoint, config_of, random_model

from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import ImageInput, Request, Sampling
from pixtral_cli.model import free_memory, memory, slower_paths
from pixtral_cli.model.config import ModelConfig
from pixtral_cli.model.kv_cache import PAGE
from pixtral_cli.model.memory import Work

PARTS = ("decode", "prefill", "tower", "serve", "packed", "kv", "transformers")
PACKED = ("q4_k", "q4_0", "q6_k", "q8_0", "fp8", "nf4")
IMAGE, BREAK = 10, 12
GREEDY = Sampling()
SAMPLED = {
    "decode, drawn": Sampling(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01),
    "decode, penalised": Sampling(repetition_penalty=1.1, frequency_penalty=0.2),
}
"""Beside greedy choices: what they cost is a part of the greedy rate."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: contexts in tokens, a picture's side in patches."""

    short: int = 128
    long: int = 32768
    batch: int = 64
    few: int = 8
    shared: int = 512
    prompt: int = 4096
    side: int = 64
    pictures: int = 8
    matrix: int = 8192
    copy: int = 2**32
    answer: int = 320
    rounds: int = 5


TINY_SIZES = Sizes(16, 128, 4, 2, 32, 64, 4, 2, 256, 2**22, 32, 2)


class Bench:
    """The card, its ceilings, the table so far and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device, 0)
        self.on_card = self.device.type == "cuda"
        self.sizes = TINY_SIZES if options.shape == "tiny" else Sizes(rounds=3 if options.quick else 5)
        self.config, self.shape = config_of(options.shape), options.shape
        self.until = time.monotonic() + options.seconds
        card = torch.cuda.get_device_name() if self.on_card else "cpu"
        self.table = Table(options.json, card, torch.__version__)
        self.copy = self.matrix = float("nan")

    def measure(self, what: str, work: Callable[[], object]) -> None:
        """Run it if time is left; whatever goes wrong is a line."""
        begun = time.monotonic()
        if begun > self.until:
            self.table.leave_out(what, "no time left")
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001  the others are measured all the same
            self.table.leave_out(what, f"{type(error).__name__}: {str(error).strip()[:300]}")
        self.free()
        print(f"  [{what}: {time.monotonic() - begun:.1f} s]", flush=True)

    def times(self, work: Callable[[], object], rounds: int | None = None) -> list[float]:
        """Seconds of each round, after one that is not counted."""
        found = []
        for _ in range(1 + (rounds or self.sizes.rounds)):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - begun)
        return found[1:]

    def wait(self) -> None:
        if self.on_card:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.on_card:
            torch.cuda.empty_cache()


def ceilings(bench: Bench) -> None:
    """The card's own rates: a copy, and a bfloat16 product of random matrices."""
    sizes, device = bench.sizes, bench.device
    source, target = (torch.ones(sizes.copy, dtype=torch.uint8, device=device) for _ in range(2))
    copies = [2 * sizes.copy / seconds / 1e12 for seconds in bench.times(partial(target.copy_, source), 9)]
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=device).bfloat16() for _ in range(2))
    products = [2 * sizes.matrix**3 / seconds / 1e12 for seconds in bench.times(partial(torch.matmul, a, b), 9)]
    bench.copy = bench.table.add("copy", "-", 0, 1, copies, "TB/s") * 1e12
    bench.matrix = bench.table.add("matrix product", "bfloat16", sizes.matrix, 1, products, "TF/s") * 1e12


class Loaded:
    """A model of random weights in one encoding, and an engine of it."""

    def __init__(self, bench: Bench, encoding: str, **engine: object) -> None:
        sizes, begun = bench.sizes, time.monotonic()
        self.bench, self.encoding = bench, encoding
        if bench.on_card:
            torch.cuda.reset_peak_memory_stats()
        self.checkpoint = RandomCheckpoint(bench.config, encoding, bench.device)
        self.model = random_model(self.checkpoint, bench.config)
        room = max(sizes.batch * (sizes.shared + 2 * sizes.answer), sizes.long + 1024) + 4096
        self.engine = Engine(self.model, sizes.long + 1024, sizes.batch, kv_tokens=room, speculative=False, **engine)
        for note in slower_paths.notes(bench.device, [encoding]):
            bench.table.leave_out(f"a fast path of {encoding}", note)
        bench.wait()
        taken = torch.cuda.memory_allocated() / 1e9 if bench.on_card else 0.0
        print(
            f"  [{encoding}: made in {time.monotonic() - begun:.1f} s; {self.weight_bytes / 1e9:.2f} GB are read for a "
            f"token; {taken:.1f} GB of the card are taken]",
            flush=True,
        )
        work = Work(sizes.batch, self.engine.max_length, 0, str(engine.get("kv_cache_dtype", "auto")))
        plan = memory.plan(self.checkpoint.tensors, self.checkpoint.placement, bench.config, "gpu", work)
        self.planned = plan.taken(self.engine.table.count * PAGE)

    def tell_memory(self) -> None:
        """What torch has taken of the card at most, beside what was planned for it."""
        if self.bench.on_card:
            most, room = free_memory.taken_bytes(self.bench.device), self.engine.table.count * PAGE
            print(f"  [{self.encoding}: {most / 1e9:.2f} GB were taken at most, {self.planned / 1e9:.2f} planned]")
            error, asked = abs(most / self.planned - 1), (0.10, "within 10%")
            table = self.bench.table
            table.add(
                "memory, from its plan",
                self.encoding,
                room,
                self.engine.scheduler.max_batch_size,
                [error],
                "error",
                None,
                asked,
            )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices that a token's way through the decoder and its head reads."""
        names = ("language_model.layers.", "lm_head.")
        return sum(info.nbytes for name, info in self.checkpoint.tensors.items() if name.startswith(names))

    def decode_limit(self, batch: int, context: int) -> float:
        """Tokens a second that memory allows."""
        text = self.bench.config.text
        token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 2  # keys and values in bfloat16
        return batch * self.bench.copy / (self.weight_bytes + batch * context * token)

    def prefill_limit(self, tokens: int) -> float:
        """Tokens a second that the matrix units allow: two operations a weight, and the causal half of attention."""
        text = self.bench.config.text
        attention = 2 * text.num_layers * text.num_heads * text.head_dim * tokens
        return self.bench.matrix / (2 * self.model.multiplications_per_token + attention)


@contextmanager
def loaded(bench: Bench, encoding: str, **engine: object) -> Iterator[Loaded]:
    """Nothing of it is left in memory afterwards."""
    one = Loaded(bench, encoding, **engine)
    try:
        yield one
        one.tell_memory()
    finally:
        one.__dict__.clear()
        del one
        bench.free()


def text(length: int) -> tuple[int, ...]:
    return engine_rates.text(length, SPOKEN)


def decode_rates(one: Loaded, batch: int, context: int, sampling: Sampling = GREEDY) -> list[float]:
    """Tokens a second of each round, while `batch` requests decode after `context` tokens."""
    most = one.engine.max_length - context
    requests = [Request(text(context), most, sampling=sampling) for _ in range(batch)]
    return engine_rates.decode_rates(one.engine, requests, one.bench.sizes.rounds)


def first_tokens(one: Loaded, make: Callable[[], Request]) -> list[float]:
    """Seconds to the first token, in each round."""
    return engine_rates.first_tokens(one.engine, make, one.bench.sizes.rounds)


def decode(one: Loaded) -> None:
    bench, sizes, table = one.bench, one.bench.sizes, one.bench.table

    def row(batch: int, context: int, share: float | None) -> None:
        limit, single = one.decode_limit(batch, context), table.found("decode", one.encoding, sizes.short, 1)
        asked = None if share is None else (share * limit, f"{share:.0%} of the limit")
        if batch == sizes.batch and single:
            asked = 40 * single, "40 x one request"
        rates = decode_rates(one, batch, context)
        table.add("decode", one.encoding, context, batch, rates, "tok/s", limit, asked)

    for batch, context, share in (
        (1, sizes.short, 0.70),
        (sizes.few, sizes.shared, None),
        (sizes.batch, sizes.shared, None),
        (1, sizes.long, 0.65),
    ):
        bench.measure(f"decode {one.encoding}, {batch} x {context}", partial(row, batch, context, share))

    def sampled(kind: str) -> None:
        batch, context = sizes.batch, sizes.shared
        greedy = table.found("decode", one.encoding, context, batch)
        table.add(kind, one.encoding, context, batch, decode_rates(one, batch, context, SAMPLED[kind]), limit=greedy)

    for kind in SAMPLED:
        bench.measure(kind, partial(sampled, kind))


def prefill(one: Loaded) -> None:
    table, tokens = one.bench.table, one.bench.sizes.prompt
    rates = [tokens / seconds for seconds in first_tokens(one, lambda: Request(text(tokens), 1))]
    limit, plain = one.prefill_limit(tokens), table.found("prefill", "bfloat16", tokens, 1)
    asked = 0.65 * limit, "65% of the limit"
    if one.encoding != "bfloat16":
        asked = (0.8 * plain, "0.8 of bfloat16") if plain else None
    table.add("prefill", one.encoding, tokens, 1, rates, "tok/s", limit, asked)


def pictures(bench: Bench, count: int) -> list[torch.Tensor]:
    side = bench.sizes.side * 16
    return [torch.randn(3, side, side) for _ in range(count)]


def tower_operations(config: ModelConfig, patches: int) -> float:
    """Of one picture: the tower's matrices, its attention without order, and the projector."""
    tower, hidden = config.vision, config.text.hidden_size
    width, inner = tower.hidden_size, tower.intermediate_size
    layer = 2 * (4 * width * width + 3 * width * inner) + 4 * patches * width
    return patches * (tower.num_layers * layer + 2 * (width * hidden + hidden * hidden))


@torch.inference_mode()
def tower(one: Loaded) -> None:
    bench, sizes = one.bench, one.bench.sizes
    for count in (sizes.pictures, 1):
        pixels = [each.to(bench.device, torch.bfloat16) for each in pictures(bench, count)]
        limit = 1e3 * tower_operations(bench.config, sizes.side**2) / bench.matrix
        asked = (limit / 0.40, "40% of the limit") if count > 1 else None
        each = [1e3 * seconds / count for seconds in bench.times(partial(one.model.encode_images, pixels))]
        bench.table.add("tower, each picture", "bfloat16", sizes.side**2, count, each, "ms", limit, asked)


def picture_prompt(one: Loaded) -> None:
    """The first token after a picture that nobody has shown before, against the tower and as long a text alone."""
    bench, side = one.bench, one.bench.sizes.side
    ids = tuple(([IMAGE] * side + [BREAK]) * side)

    def shown() -> Request:
        [pixels] = pictures(bench, 1)
        key = hashlib.sha256(random.randbytes(16)).digest()
        return Request(ids, 1, images=(ImageInput(key, side * side, lambda: pixels),))

    words = 1e3 * statistics.median(first_tokens(one, lambda: Request(text(len(ids)), 1)))
    alone = bench.table.found("tower, each picture", "bfloat16", side * side, 1)
    limit = alone + words if alone else None
    asked = (1.15 * limit, "tower + prefill + 15%") if limit else None
    times = [1e3 * seconds for seconds in first_tokens(one, shown)]
    bench.table.add("first token of a picture", one.encoding, len(ids), 1, times, "ms", limit, asked)


def serve(one: Loaded) -> None:
    """The same engine behind `pixtral serve`'s application, asked by another process."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from support.serving import serving

    from pixtral_cli.api import Pixtral
    from pixtral_cli.server.service import Service
    from pixtral_cli.source import Source

    bench, sizes = one.bench, one.bench.sizes
    model = Pixtral(Source.open("tiny"), one.checkpoint.placement, one.engine, 0.0)
    client = Path(__file__).with_name("http_streams.py")
    rates = []
    try:
        with serving(Service(model, ("x",))) as server:
            port = server.url.rpartition(":")[2]
            figures = [port, sizes.batch, sizes.answer, sizes.shared, SPOKEN]
            for _ in range(3):
                command = [sys.executable, str(client), *map(str, figures)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=60)
                if done.returncode:
                    raise RuntimeError(done.stderr.strip()[-300:])
                rates.append(json.loads(done.stdout)["rate"])
    finally:
        model.driver.stop(5.0)
    engine = bench.table.found("decode", one.encoding, sizes.shared, sizes.batch)
    asked = (0.8 * engine, "80% of the engine") if engine else None
    bench.table.add("serve", one.encoding, sizes.shared, sizes.batch, rates[1:], "tok/s", engine, asked)


def packed(bench: Bench, encoding: str) -> None:
    """All that is measured with packed weights."""
    sizes, table = bench.sizes, bench.table

    def row(one: Loaded, batch: int) -> None:
        of, times = ("bfloat16", 1.5 if encoding in ("q4_k", "q4_0") else 1.2) if batch == 1 else (encoding, 6)
        base, limit = table.found("decode", of, sizes.short, 1), one.decode_limit(batch, sizes.short)
        asked = (times * base, f"{times:g} x one in {of}") if base else None
        table.add("decode", encoding, sizes.short, batch, decode_rates(one, batch, sizes.short), "tok/s", limit, asked)

    with loaded(bench, encoding) as one:
        bench.measure(f"decode {encoding}, 1", partial(row, one, 1))
        if encoding == "q4_k":
            bench.measure(f"decode {encoding}, {sizes.few}", partial(row, one, sizes.few))
            bench.measure(f"prefill {encoding}", partial(prefill, one))


def kv(bench: Bench) -> None:
    """How far logits are from those of a bfloat16 cache, when keys and values are kept in fp8."""
    vocabulary, tokens = bench.config.text.vocab_size, min(bench.sizes.prompt, 96)
    checkpoint = RandomCheckpoint(bench.config, "bfloat16", bench.device)
    model, ids = random_model(checkpoint, bench.config), text(tokens)
    logits = []
    for kind in ("auto", "fp8"):
        engine = Engine(model, 4 * PAGE + tokens, kv_cache_dtype=kind)
        engine.submit(Request(ids, 0, prompt_logprobs=vocabulary))
        scores = [part for event in engine_rates.run(engine) for part in event.prompt_scores]
        logprobs = torch.cat(
            [torch.zeros_like(s.best_logprobs).scatter(1, s.best_ids, s.best_logprobs) for s in scores]
        )
        spoken = logprobs[:, :SPOKEN]
        logits.append(spoken - spoken.mean(1, keepdim=True))
    plain, narrow = logits
    error = (narrow - plain).norm(dim=1) / plain.norm(dim=1)
    bench.table.add("logits with fp8 keys and values", "bfloat16", tokens, 1, error.tolist(), "error")


def transformers(bench: Bench) -> None:
    """Its own model of the same sizes, greedy: the time between a short and a longer answer, prefill left out."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {**SHAPES[bench.shape][0]}
    rope = {"rope_theta": sizes.pop("rope_theta"), "rope_type": "default"}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with bench.device:
            model = MistralForCausalLM(MistralConfig(**sizes, rope_parameters=rope, dtype="bfloat16")).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None

    def seconds(batch: int, context: int, tokens: int) -> float:
        ids = torch.tensor([text(context) for _ in range(batch)], device=bench.device)
        bench.wait()
        begun = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        bench.wait()
        return time.perf_counter() - begun

    def row(batch: int, context: int, times: int) -> None:
        seconds(batch, context, 2)
        pairs = [(seconds(batch, context, 2), seconds(batch, context, 14)) for _ in range(min(3, bench.sizes.rounds))]
        rates = [12 * batch / max(long - short, 1e-9) for short, long in pairs]
        theirs = bench.table.add("decode by transformers", "bfloat16", context, batch, rates)
        if ours := bench.table.found("decode", "bfloat16", context, batch):
            asked = times, f"{times} x"
            bench.table.add("times transformers", "bfloat16", context, batch, [ours / theirs], "x", asked=asked)

    with torch.inference_mode():
        for batch, context, times in ((1, bench.sizes.short, 10), (bench.sizes.batch, bench.sizes.shared, 6)):
            bench.measure(f"transformers, {batch} x {context}", partial(row, batch, context, times))


def plain(bench: Bench, parts: list[str]) -> None:
    """All that is measured with bfloat16 weights."""
    with loaded(bench, "bfloat16") as one:
        if "decode" in parts:
            decode(one)
        if "prefill" in parts:
            bench.measure("prefill bfloat16", lambda: prefill(one))
        if "tower" in parts:
            bench.measure("tower", lambda: tower(one))
            bench.measure("first token of a picture", lambda: picture_prompt(one))
        if "serve" in parts:
            bench.measure("serve", lambda: serve(one))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the rows are written")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--encodings", default=",".join(PACKED), help="packed ones to measure")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--seconds", type=float, default=600, help="nothing begins after so many")
    parser.add_argument("--shape", choices=SHAPES, default="nemo")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    bench, parts = Bench(options), options.only.split(",")
    random.seed(0)
    torch.manual_seed(0)
    print(f"{bench.table.card}, torch {torch.__version__}, {today()}, shape {options.shape}", flush=True)
    bench.measure("ceilings", lambda: ceilings(bench))
    if {"decode", "prefill", "tower", "serve"} & set(parts):
        bench.measure("bfloat16", lambda: plain(bench, parts))
    for encoding in options.encodings.split(",") if "packed" in parts else ():
        bench.measure(encoding, partial(packed, bench, encoding))
    if "kv" in parts:
        bench.measure("fp8 keys and values", lambda: kv(bench))
    if "transformers" in parts:
        bench.measure("transformers", lambda: transformers(bench))
    table = bench.table
    missed = sum(row.reached is False for row in table.rows)
    print(f"{len(table.rows)} rows, {missed} below what is asked, {len(table.left_out)} left out")


if __name__ == "__main__":
    main()
