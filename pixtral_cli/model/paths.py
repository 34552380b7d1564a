"""A device in, sentences on what is slower there than it could be out. Knows no model.

The fast paths of a card need Triton and NVRTC, which torch for CUDA brings along. Where one is missing or fails, plain
torch serves, with the same results.
"""

from __future__ import annotations

import torch

from pixtral_cli.devices import INSTALL_CUDA, NO_CUDA
from pixtral_cli.model import triton_support


def sees_gpus() -> bool:
    """Whether torch is built for GPUs at all."""
    return torch.version.cuda is not None or torch.version.hip is not None


def notes(device: torch.device) -> list[str]:
    """A sentence for each path that cannot be taken on `device`; none for a CPU, or where all can."""
    if device.type != "cuda" or triton_support.available(device):
        return []
    return [f"Triton does not work on {device}, so plain torch serves, more slowly: {triton_support.why_not()}."]


def notes_of_this_machine() -> list[str]:
    """The same for all GPUs that torch sees, each sentence once; or that it cannot see any."""
    if not sees_gpus():
        return [f"{NO_CUDA} Install one for CUDA: {INSTALL_CUDA}"]
    told = (note for number in range(torch.cuda.device_count()) for note in notes(torch.device("cuda", number)))
    return list(dict.fromkeys(told))
