"""Numbers to a device and back, without waiting for it. Knows no model and no sequences.

On a GPU, work is done in the order in which it was asked for, and Python runs ahead. An ordinary copy of a tensor would
wait until everything before it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Within it `device` is the one that kernels are launched on, if it is a card. Each thread has its own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def to_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the numbers, or of equally long lists of them, on `device`; there before anything asked for later."""
    return send(torch.tensor(values, dtype=dtype), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The same for a tensor of the computer's memory."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class ToHost:
    """Tensors on their way from a device, as they are when everything asked for so far is done."""

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrival = None
        card = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if card is not None:
            self._arrival = torch.cuda.current_stream(card).record_event()

    def read(self) -> list[Tensor]:
        """Wait for them; on the CPU."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copies
