"""How fast weights come onto a card, and what of each memory that takes.

    python tests/benchmarks/gpu_load.py [--json FILE] [--layers 8] [--seconds 40] [--device cuda|cpu]

Writes a checkpoint of random bfloat16 weights in the shapes of a 12 B NeMo's layers (8 of them: 4.7 GB) into TMPDIR.
Compares one copy of pinned memory, plain `.to(device)` of the mapped tensors, reading alone, sizes of the staging
buffers, and `model.load`, as it is and converted to q4_k. Then loads it as a user does, runs the longest prefill and a
batch of answers, and compares what was planned with what was taken. Prints tables; parts for which no time is left
are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pixtral_cli import Pixtral
from pixtral_cli.encoding_choices import find
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Failure, Request
from pixtral_cli.model import to_card
from pixtral_cli.model.families import read_config
from pixtral_cli.model.free_memory import free_bytes, taken_bytes
from pixtral_cli.model.load import load
from pixtral_cli.model.memory import PREFILL, Plan
from pixtral_cli.model.placement import place
from pixtral_cli.model.to_card import Reading, ToCard
from pixtral_cli.tiny import FOLDER
from weights_cache import checkpoint

CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 16384,
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "max_position_embeddings": 32768,
    "eos_token_id": 2,
}
MIB, GB = 2**20, 1e9
STAGES = ((64, 2, 8), (32, 2, 8), (16, 4, 8), (16, 2, 8), (8, 4, 8), (64, 2, 16), (32, 2, 16), (64, 2, 4), (64, 2, 8))
"""MiB of a buffer, buffers, threads that fill them."""
ROWS: list[dict[str, Any]] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    ends, device = time.monotonic() + options.seconds, torch.device(options.device)
    with tempfile.TemporaryDirectory(prefix="pixtral-load-") as name:
        folder = Path(name)
        begun = time.perf_counter()
        outside(device, "CUDA begun")
        nbytes = write_checkpoint(folder, options.layers, device)
        row("written", seconds=time.perf_counter() - begun, nbytes=nbytes)
        few = first_layers(folder, min(2, options.layers))
        parts: list[Callable[[], None]] = [
            lambda: copies(device),
            lambda: loads(folder, device, None),
            lambda: loads(folder, device, None),
            lambda: readings(folder, device),
            lambda: stages(folder, device),
            lambda: planned(folder, device),
            lambda: loads(few, device, "q4_k"),
        ]
        for part in parts:
            if time.monotonic() < ends - 2:
                attempt(part)
    if options.json:
        options.json.write_text(
            json.dumps({"card": card(device), "threads": torch.get_num_threads(), "rows": ROWS}, indent=1)
        )


def attempt(part: Callable[[], None]) -> None:
    """One part; if it fails, the others still tell."""
    try:
        part()
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        row("failed", why=traceback.format_exc().splitlines()[-1])


def row(name: str, *, seconds: float | None = None, nbytes: int | None = None, **more: Any) -> None:
    """One line of the table, printed at once."""
    if seconds and nbytes:
        more = {"GB/s": round(nbytes / seconds / GB, 2), **more}
    told = {"name": name, **({"seconds": round(seconds, 4)} if seconds else {}), **more}
    ROWS.append(told)
    print(f"{name:<44}", "  ".join(f"{key} {value}" for key, value in told.items() if key != "name"), flush=True)


def card(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}" if device.type == "cuda" else "cpu"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_checkpoint(folder: Path, layers: int, device: torch.device) -> int:
    """A folder that loads, a file a layer; the random numbers of a matrix's shape are made once. -> bytes of weights"""
    from safetensors.torch import save_file

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(FOLDER / name, folder)
    hidden, ffn, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes = {
        "self_attn.q_proj": (4096, hidden),
        "self_attn.k_proj": (1024, hidden),
        "self_attn.v_proj": (1024, hidden),
        "self_attn.o_proj": (hidden, 4096),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    made = {part: random(shape, device) for part, shape in shapes.items()}
    norm, table = torch.ones(hidden, dtype=torch.bfloat16), random((vocab, hidden), device)
    index: dict[str, str] = {}

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> int:
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        return sum(tensor.nbytes for tensor in tensors.values())

    ends = {"model.embed_tokens.weight": table, "model.norm.weight": norm, "lm_head.weight": table.clone()}
    written = shard(layers, ends)
    for layer in range(layers):
        tensors = {f"model.layers.{layer}.{part}.weight": weight for part, weight in made.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = norm.clone()
        written += shard(layer, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return written


def first_layers(folder: Path, layers: int) -> Path:
    """The same model with so few layers, in a folder of its own that shares the files."""
    few = folder / "few"
    few.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, few)
    whole = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    layered = {name: int(name.split(".")[2]) if ".layers." in name else 0 for name in whole}
    index = {name: file for name, file in whole.items() if layered[name] < layers}
    for file in set(index.values()):
        (few / file).hardlink_to(folder / file)
    (few / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (few / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return few


def random(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    return (torch.randn(shape, device=device) * shape[1] ** -0.5).bfloat16().cpu()


def copies(device: torch.device) -> None:
    """The yardstick: 1 GiB of pinned memory, in one copy."""
    pinned = torch.empty(2**30, dtype=torch.uint8, pin_memory=device.type == "cuda").fill_(1)
    there = torch.empty_like(pinned, device=device)
    best = min(seconds(lambda: there.copy_(pinned, non_blocking=True), device) for _ in range(5))
    row("one copy of 1 GiB of pinned memory", seconds=best, nbytes=pinned.nbytes)


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    begun = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - begun


def mapped(folder: Path) -> Iterator[torch.Tensor]:
    """Each tensor of a checkpoint, mapped, and let go of afterwards."""
    opened = checkpoint.open(folder)
    for name in opened.tensors:
        yield opened.weight(name)
        opened.release(name)


def total_bytes(folder: Path) -> int:
    return sum(info.nbytes for info in checkpoint.open(folder).tensors.values())


def readings(folder: Path, device: torch.device) -> None:
    """The mapped tensors, read alone, and sent plainly."""
    total = total_bytes(folder)
    buffer = torch.empty(64 * MIB, dtype=torch.uint8, pin_memory=device.type == "cuda").fill_(0)

    def read(reading: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        for tensor in mapped(folder):
            for piece in tensor.reshape(-1).view(torch.uint8).split(len(buffer)):
                reading(piece, buffer[: len(piece)])

    most = torch.get_num_threads()
    for threads in sorted({most, max(1, most // 2), 8, 4, 1}):
        reading = Reading(threads)
        row(f"reading, {threads} threads", seconds=seconds(partial(read, reading), device), nbytes=total)
        reading.end()
    row(
        "reading by torch",
        seconds=seconds(partial(read, lambda piece, there: there.copy_(piece)), device),
        nbytes=total,
    )

    def plainly() -> None:
        for tensor in mapped(folder):
            tensor.to(device)

    row("plain .to(device)", seconds=seconds(plainly, device), nbytes=total)


def stages(folder: Path, device: torch.device) -> None:
    """The mapped tensors, sent in stages of several sizes."""
    total = total_bytes(folder)
    for size, count, readers in STAGES:
        with mock.patch.object(to_card, "READERS", readers):
            begun = time.perf_counter()
            stages = ToCard(device, size * MIB, count)
            made = time.perf_counter() - begun

        def staged(stages: ToCard = stages) -> None:
            with stages:
                for tensor in mapped(folder):
                    stages.tensor(tensor)

        took = seconds(staged, device)
        label = f"in {count} stages of {size} MiB, {readers} readers"
        row(label, seconds=took, nbytes=total, made_in=round(made, 3))


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, int]]:
    """Inside, the largest growth of this process's own memory (files' pages not counted); on a card, of torch's."""
    peak, done = {}, threading.Event()
    before = anonymous()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    def watch() -> None:
        most = 0
        while not done.wait(0.005):
            most = max(most, anonymous() - before)
            peak["host_MiB"] = most // MIB

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        if device.type == "cuda":
            peak["peak_on_card_MiB"] = torch.cuda.max_memory_reserved(device) // MIB
            peak["then_MiB"] = torch.cuda.memory_reserved(device) // MIB


def anonymous() -> int:
    """Bytes of this process that are resident and of no file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def loads(folder: Path, device: torch.device, encoding: str | None) -> None:
    """`model.load`, whole."""
    opened = checkpoint.open(folder)
    config, placement = read_config(opened.config), place(opened.tensors, encoding and find(encoding))
    total = total_bytes(folder)
    with watched(device) as peak:
        begun = time.perf_counter()
        model = load(opened, config, placement, device)
        wait(device)
        took = time.perf_counter() - begun
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    del model
    row(f"model.load, {encoding or 'bfloat16'}", seconds=took, nbytes=total, allocated_MiB=held // MIB, **peak)


def planned(folder: Path, device: torch.device) -> None:
    """What is planned and what is then taken, with the longest prefill and a batch of answers."""
    name = "cpu" if device.type == "cpu" else "gpu"
    if name == "gpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    outside(device, "before")
    begun = time.perf_counter()
    model = Pixtral.load(folder, devices=name, max_length=PREFILL, max_batch_size=16, kv_cache_memory=2**30)
    row("Pixtral.load", seconds=time.perf_counter() - begun, nbytes=total_bytes(folder), notes=model.notes)
    outside(device, "loaded")
    begun = time.perf_counter()
    model.engine.warm_up()
    row("graphs", seconds=time.perf_counter() - begun)
    outside(device, "graphs")
    plan, engine, tokens = model.plan, model.engine, model.memory.kv_tokens
    row("planned, MiB", **{part: value // MIB for part, value in vars(plan).items() if value >= MIB})
    taken(device, plan, tokens, "loaded")
    answer(engine, [PREFILL - 16, PREFILL - 100])
    outside(device, "a long prompt")
    taken(device, plan, tokens, "a long prompt")
    answer(engine, [100 + number for number in range(16)])
    outside(device, "16 answers")
    taken(device, plan, tokens, "16 answers")
    free = free_bytes(device) or 0
    row("left free of the card", MiB=free // MIB, margin_MiB=plan.margin(free) // MIB)


def answer(engine: Engine, lengths: Sequence[int]) -> None:
    """Run a request for each length of a prompt to its end."""
    for length in lengths:
        ids = torch.randint(1000, 16000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        engine.submit(Request(tuple(ids), max_new_tokens=12))
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Failure):
                raise event.error


def taken(device: torch.device, plan: Plan, tokens: int, when: str) -> None:
    """What torch holds at most, beside what was planned for all of it."""
    most = taken_bytes(device) if device.type == "cuda" else 0
    expected = plan.taken(tokens)
    row(f"taken: {when}", MiB=most // MIB, planned_MiB=expected // MIB, ratio=round(most / expected, 3))


def outside(device: torch.device, when: str) -> None:
    """What is taken of the card and not by torch's allocator: CUDA's context, loaded kernels, other processes."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        row(f"outside torch: {when}", MiB=(whole - free - torch.cuda.memory_reserved(device)) // MIB)


if __name__ == "__main__":
    main()
