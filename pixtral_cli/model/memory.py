"""Headers and a config in, the bytes that a model takes out; and a refusal in figures where they are not there.

Reads no weights, and needs no torch but for what is free on a GPU that torch has been given.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_cli.encoding_choices import CHOICES, kv_encoding
from pixtral_cli.errors import ModelError
from pixtral_cli.model.config import TextConfig
from pixtral_cli.model.placement import Placement, place
from weights_cache.encodings import ENCODINGS
from weights_cache.formats.reader import TensorInfo
from weights_cache.names import EMBEDDING

if TYPE_CHECKING:
    import torch

WORKSPACE = 256 * 2**20  # bytes; activations and buffers beside the weights
LENGTHS = (4096, 32768, 131072)  # tokens
SMI_TIMEOUT = 5.0  # seconds
GIB = 2**30
WEIGHTS_PER_KERNEL_BYTE = {"q4_0": 8, "q4_k": 8, "nf4": 32}
"""What kernels.int4 has beside the codes is a bfloat16 scale and zero for 32 weights, kernels.nf4 a scale for 64; they
import torch, and so cannot be asked here."""
FP8_SCALE = 1  # byte for the numbers of a head and token that fp8 keeps
KV_SHARE = 0.9  # of what the weights leave: some is for images on their way
LEAST = 256  # tokens, with which something can be asked


@dataclass(frozen=True)
class Device:
    """`name` as --devices takes it. `free` is in bytes, None where nobody says."""

    name: str
    free: int | None


@dataclass(frozen=True)
class Need:
    """Bytes that the weights take in `encoding`, what a CPU takes beside them, and bytes of keys and values for each
    length in tokens."""

    encoding: str
    weights: int
    beside: int
    cache: Mapping[int, int]

    def total(self, tokens: int) -> int:
        """Bytes of everything for a sequence of `tokens`, which must be among the lengths."""
        return self.weights + self.cache[tokens] + WORKSPACE

    def fits(self, device: Device, tokens: int) -> bool | None:
        """Whether that is free on `device`; None where nobody says."""
        beside = self.beside if device.name == "cpu" else 0
        return None if device.free is None else self.total(tokens) + beside <= device.free


def needs(tensors: Mapping[str, TensorInfo], config: TextConfig, kv_cache_dtype: str = "auto") -> list[Need]:
    """One Need for each encoding that can be asked for; the file's own comes first, if it is another."""
    placements = [place(tensors, None), *(place(tensors, ENCODINGS[name]) for name in CHOICES)]
    unique = {placement.label: placement for placement in reversed(placements)}
    found = []
    for placement in (unique[label] for label in dict.fromkeys(each.label for each in placements)):
        kept = kv_encoding(kv_cache_dtype, placement.dtype)
        cache = {tokens: kv_bytes(config, tokens, kept) for tokens in lengths(config)}
        weights, beside = weight_bytes(tensors, placement), kernel_bytes(tensors, placement)
        found.append(Need(placement.label, weights, beside, cache))
    return found


def lengths(config: TextConfig, wanted: Sequence[int] = LENGTHS) -> list[int]:
    """Those of the lengths that the model can have, and its own."""
    return sorted({*(tokens for tokens in wanted if tokens < config.max_length), config.max_length})


def weight_bytes(tensors: Mapping[str, TensorInfo], placement: Placement) -> int:
    """Bytes that the weights take as `placement` says: those of the file where it has them so."""
    total = 0
    for name, tensor in tensors.items():
        encoding = placement.encodings[name]
        kept = encoding == tensor.encoding
        total += tensor.nbytes if kept else int(prod(tensor.shape) * ENCODINGS[encoding].bits / 8)
    return total


def kernel_bytes(tensors: Mapping[str, TensorInfo], placement: Placement) -> int:
    """Bytes that the CPU's 4-bit kernels want beside these weights; counted where a kernel is absent, too."""
    shapes = [(placement.encodings[name], tensor.shape) for name, tensor in tensors.items() if name != EMBEDDING]
    return sum(
        prod(shape) // WEIGHTS_PER_KERNEL_BYTE[encoding]
        for encoding, shape in shapes
        if ENCODINGS[encoding].has_kernel_order(shape[0])
    )


def kv_bytes(config: TextConfig, tokens: int, kept: str) -> int:
    """Bytes of keys and values for `tokens` tokens, which are kept as "fp8" (a byte a number, and FP8_SCALE) or in one
    of torch's dtypes."""
    numbers = config.head_dim + FP8_SCALE if kept == "fp8" else config.head_dim * ENCODINGS[kept].block_bytes
    return 2 * config.num_layers * config.num_kv_heads * numbers * tokens


def devices() -> list[Device]:
    """This machine's: the cpu, then NVIDIA's GPUs in the order of their driver."""
    return [Device("cpu", free_memory()), *_gpus()]


def free_memory() -> int | None:
    """Bytes of memory that can be had now (page cache counts as free), or None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    there = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}.get("MemAvailable")
    limit = container_free()
    return there if limit is None or there is None else min(there, limit)


def container_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's own limit leaves (cgroup v2), the page cache not counted against it."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("file", 0))


def _gpus() -> list[Device]:
    """Asked of NVIDIA's own tool, which answers before torch is imported. None where GPUs are hidden or renumbered."""
    tool = shutil.which("nvidia-smi")
    if tool is None or "CUDA_VISIBLE_DEVICES" in os.environ:
        return []
    query = [tool, "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT, check=True).stdout
        rows = [line.split(",") for line in told.splitlines() if line.strip()]
        return [Device(f"gpu-{int(index)}", int(free) * 2**20) for index, free in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be had on `device` now (page cache counts as free), or None where nobody says."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def check_weights(tensors: Mapping[str, TensorInfo], placement: Placement, device: torch.device) -> None:
    """Raises ModelError, with both figures and what would fit, when the weights cannot fit on `device`."""
    need, free = _bytes_needed(tensors, placement, device), free_bytes(device)
    if free is None or need <= free:
        return
    wanted = {name: _bytes_needed(tensors, place(tensors, ENCODINGS[name]), device) for name in CHOICES}
    fitting = [name for name, bytes_needed in wanted.items() if bytes_needed <= free]
    if fitting:
        hint = f"Use --quantization-encoding {fitting[0]}, which needs {wanted[fitting[0]] / GIB:.1f} GiB."
    else:
        hint = "No encoding fits: free memory, take a smaller model" + (
            " or use --devices cpu." if device.type == "cuda" else " or a larger machine."
        )
    raise ModelError(
        f"This model in {placement.label} needs {need / GIB:.1f} GiB of memory, "
        f"and {device} has {free / GIB:.1f} GiB free.",
        hint=hint,
    )


def _bytes_needed(tensors: Mapping[str, TensorInfo], placement: Placement, device: torch.device) -> int:
    beside = kernel_bytes(tensors, placement) if device.type == "cpu" else 0
    return weight_bytes(tensors, placement) + beside + WORKSPACE


def kv_tokens(
    tensors: Mapping[str, TensorInfo],
    placement: Placement,
    config: TextConfig,
    device: torch.device,
    wanted: int,
    memory: int | None = None,
    kv_cache_dtype: str = "auto",
) -> int:
    """Tokens whose keys and values there is room for: `wanted`, or as many as `memory` bytes hold; without such a
    bound as many as fit on `device` beside weights that are not loaded yet.

    Raises ModelError when there is no room for as many as LEAST.
    """
    token = kv_bytes(config, 1, kv_encoding(kv_cache_dtype, placement.dtype))
    if memory is not None:
        if memory // token < min(LEAST, wanted):
            raise ModelError(
                f"--kv-cache-memory has room for {memory // token} tokens.",
                hint=f"Give at least {-(-LEAST * token // 2**20)}MiB; the longest prompt and its answer must fit.",
            )
        return min(memory // token, wanted)
    free = free_bytes(device)
    if free is None:
        return wanted
    left = int((free - _bytes_needed(tensors, placement, device)) * KV_SHARE)
    room = left // token
    if room < min(LEAST, wanted):
        raise ModelError(
            f"The weights leave {max(left, 0) / GIB:.1f} GiB on {device} for keys and values: {max(room, 0)} tokens.",
            hint="Free memory, or take a smaller encoding with --quantization-encoding.",
        )
    return min(room, wanted)
