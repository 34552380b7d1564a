"""Headers in, bytes needed out, and a refusal in figures before anything large is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pixtral_cli.encodings import CHOICES, ENCODINGS
from pixtral_cli.errors import ModelError
from pixtral_cli.model.config import TextConfig
from pixtral_cli.model.needs import WORKSPACE, free_memory, kernel_bytes, kv_bytes, weight_bytes
from pixtral_cli.model.placement import Placement, place
from weights_cache.checkpoint import TensorInfo

GIB = 2**30
KV_SHARE = 0.9  # of what the weights leave: some is for pictures on their way
LEAST = 256  # tokens, with which something can be asked


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be had on `device` now (page cache counts as free), or None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def check_weights(tensors: Mapping[str, TensorInfo], placement: Placement, device: torch.device) -> None:
    """Raises ModelError, with both figures and what would fit, when the weights cannot fit on `device`."""
    need, free = _bytes_needed(tensors, placement, device), free_bytes(device)
    if free is None or need <= free:
        return
    needs = {name: _bytes_needed(tensors, place(tensors, ENCODINGS[name]), device) for name in CHOICES}
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


def _bytes_needed(tensors: Mapping[str, TensorInfo], placement: Placement, device: torch.device) -> int:
    beside = kernel_bytes(tensors, placement) if device.type == "cpu" else 0
    return weight_bytes(tensors, placement) + beside + WORKSPACE


def kv_tokens(
    tensors: Mapping[str, TensorInfo], placement: Placement, config: TextConfig, device: torch.device, wanted: int
) -> int:
    """Tokens whose keys and values fit on `device` beside weights that are not loaded yet: `wanted`, or fewer.

    Raises ModelError when there is no room for as many as LEAST.
    """
    free = free_bytes(device)
    if free is None:
        return wanted
    width = int(ENCODINGS[placement.dtype].bits) // 8
    left = int((free - _bytes_needed(tensors, placement, device)) * KV_SHARE)
    room = left // kv_bytes(config, 1, width)
    if room < min(LEAST, wanted):
        raise ModelError(
            f"The weights leave {max(left, 0) / GIB:.1f} GiB on {device} for keys and values: {max(room, 0)} tokens.",
            hint="Free memory, or take a smaller encoding with --quantization-encoding.",
        )
    return min(room, wanted)
