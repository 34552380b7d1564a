"""Headers in, bytes needed out, and a refusal in figures before anything large is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from pixtral_cli.encodings import CHOICES, ENCODINGS
from pixtral_cli.errors import ModelError, RequestError
from pixtral_cli.model.config import TextConfig
from pixtral_cli.model.kv_cache import rounded_up
from pixtral_cli.model.placement import Placement, place
from weights_cache.checkpoint import TensorInfo

GIB = 2**30
WORKSPACE = 256 * 2**20  # activations and buffers beside the weights


def weight_bytes(tensors: Mapping[str, TensorInfo], placement: Placement) -> int:
    """Bytes that the weights take as `placement` says."""
    return sum(_bytes(tensor, placement.encodings[name]) for name, tensor in tensors.items())


def _bytes(tensor: TensorInfo, encoding: str) -> int:
    if encoding == tensor.encoding:
        return tensor.nbytes
    return int(prod(tensor.shape) * ENCODINGS[encoding].bits / 8)


def kv_bytes(config: TextConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values for `tokens` tokens."""
    return config.kv_numbers_per_token * tokens * dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be had on `device` now (page cache counts as free), or None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    meminfo = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    there = meminfo.get("MemAvailable")
    limit = _container_free()
    return there if limit is None or there is None else min(there, limit)


def _container_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's own limit leaves (cgroup v2), the page cache not counted against it."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("file", 0))


def check_weights(tensors: Mapping[str, TensorInfo], placement: Placement, device: torch.device) -> None:
    """Raises ModelError, with both figures and what would fit, when the weights cannot fit on `device`."""
    need, free = weight_bytes(tensors, placement) + WORKSPACE, free_bytes(device)
    if free is None or need <= free:
        return
    needs = {name: weight_bytes(tensors, place(tensors, ENCODINGS[name])) + WORKSPACE for name in CHOICES}
    fitting = [name for name, bytes_needed in needs.items() if bytes_needed <= free]
    if fitting:
        hint = f"Use --quantization-encoding {fitting[0]}, which needs {needs[fitting[0]] / GIB:.1f} GiB."
    else:
        hint = "No encoding fits: free memory, take a smaller model" + (
            " or use --devices cpu." if device.type == "cuda" else " or a larger machine."
        )
    raise ModelError(
        f"This model in {placement.label} needs {need / GIB:.1f} GiB of memory, "
        f"and {device} has {free / GIB:.1f} GiB free.",
        hint=hint,
    )


def check_prompts(config: TextConfig, lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raises RequestError when the keys and values of prompts of these lengths cannot fit on `device` together."""
    need, free = kv_bytes(config, sum(map(rounded_up, lengths)), dtype), free_bytes(device)
    if free is None or need <= free:
        return
    several = len(lengths) > 1
    prompts = f"{len(lengths)} prompts of {sum(lengths)} tokens" if several else f"A prompt of {lengths[0]} tokens"
    raise RequestError(
        f"{prompts} need{'' if several else 's'} {need / GIB:.1f} GiB for keys and values, "
        f"and {device} has {free / GIB:.1f} GiB free.",
        hint=("Lower --max-batch-size, or send" if several else "Send") + " shorter prompts or fewer pictures.",
    )
