"""Tensors in the computer's memory in, the same on a card out, read and copied at once. Knows no model and no file.

A card copies fast only from pinned memory, and a file is mapped into memory that is not. So a tensor is read into
pinned buffers piece by piece, by several threads, and while one piece travels the next is read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from typing import Self

import torch
from torch import Tensor

from weights_cache.packed import PackedWeight

PIECE = 64 * 2**20  # bytes: long enough that starting a copy costs nothing, short enough that a small model overlaps
BUFFERS = 2
READERS = 8  # threads, if torch may use as many: one reads a mapped file at a third of the speed of a card's copies
LEAST = 2**20  # bytes that are worth a thread
Read = Callable[[Tensor, Tensor], None]


class ToCard:
    """Copies tensors to `device`, of any dtype and layout, and packed weights with all their parts.

    Copies run on a stream of their own. The stream that is current when one is asked for waits for it, so that what
    comes back can be used at once; the host waits only for a buffer that it wants to fill again.
    """

    def __init__(self, device: torch.device, piece: int = PIECE, buffers: int = BUFFERS) -> None:
        self.device = device
        self._reading = Reading(min(READERS, torch.get_num_threads()))
        self._buffers = cycle([_Buffer(piece, device, self._reading) for _ in range(buffers)])
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until all is there, whatever stream uses it next, and give back the card's memory that is free again."""
        self._reading.end()
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def weight(self, weight: Tensor | PackedWeight) -> Tensor | PackedWeight:
        """The same weight on the card."""
        if isinstance(weight, Tensor):
            return self.tensor(weight)
        parts = {name: self.tensor(part) for name, part in weight.tensors().items()}
        return replace(weight, **parts)  # type: ignore[type-var]  # each of them is a dataclass of its parts

    def tensor(self, source: Tensor) -> Tensor:
        """The same tensor on the card, contiguous; one that is there already as it is."""
        if source.is_cuda:
            return source
        copied = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        if self._stream is None:
            self._send(source, copied)
            return copied
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)  # the memory of `copied` may have been another's, who still uses it
        with torch.cuda.stream(self._stream):
            self._send(source, copied)
        current.wait_stream(self._stream)
        return copied

    def _send(self, source: Tensor, copied: Tensor) -> None:
        """Start the copies of all pieces; the last of them may not have ended."""
        whole, there = _bytes(source.contiguous()), _bytes(copied)
        begin = 0
        while begin < len(whole):
            begin += next(self._buffers).send(whole[begin:], there[begin:])


class Reading:
    """Copies bytes within the computer's memory by several threads. They are not torch's, which wait for each other by
    spinning: where another program computes, that is slower than one thread."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self, source: Tensor, target: Tensor) -> None:
        """Both uint8 [n]."""
        step = max(LEAST, -(-len(source) // self._threads))
        if len(source) <= step:
            _copy(source, target)
            return
        parts = zip(source.split(step), target.split(step), strict=True)
        for part in [self._pool.submit(_copy, *part) for part in parts]:
            part.result()

    def end(self) -> None:
        self._pool.shutdown()


def _copy(source: Tensor, target: Tensor) -> None:
    ctypes.memmove(target.data_ptr(), source.data_ptr(), len(source))  # others may run Python meanwhile


class _Buffer:
    """Pinned memory for one piece, and when it may be filled again."""

    def __init__(self, nbytes: int, device: torch.device, read: Read) -> None:
        on_card = device.type == "cuda"
        self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_card)
        self._sent = torch.cuda.Event() if on_card else None
        self._read = read

    def send(self, source: Tensor, there: Tensor) -> int:
        """Start copying the first bytes of `source`, as many as there is room for, and give back their number."""
        piece = self._memory[: len(source)]
        if self._sent is not None:
            self._sent.synchronize()
        self._read(source[: len(piece)], piece)
        there[: len(piece)].copy_(piece, non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        return len(piece)


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes, uint8 [n], sharing its memory."""
    return tensor.reshape(-1).view(torch.uint8)
