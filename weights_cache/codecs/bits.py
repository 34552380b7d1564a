"""Fields of a few bits, packed into bytes, -> numbers, and back. Knows no encoding.

Everywhere `blocks` is uint8 [n, bytes of a block], aligned for numbers of two bytes.
"""

import torch
from torch import Tensor


class Scratch:
    """Arrays that are used again for the next chunk: fresh pages cost more than the arithmetic in them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._arrays: dict[str, Tensor] = {}

    def array(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The array `name`, with whatever was last in it; a new one when the shape has changed."""
        if name not in self._arrays or self._arrays[name].shape != shape:
            self._arrays[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return self._arrays[name]


def aligned(data: Tensor, size: int) -> Tensor:
    """`data` as it is, or a copy where its bytes cannot be looked at in place as numbers of `size` bytes."""
    places = (data.storage_offset(), data.data_ptr(), *data.stride()[:-1])
    whole = data.stride(-1) == 1 and not any(place % size for place in places)
    return data if whole else data.clone(memory_format=torch.contiguous_format)


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 in the bytes `at` and `at + 1` of each block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def halves(blocks: Tensor, *at: int) -> list[Tensor]:
    """`half` of each of those places."""
    return [half(blocks, place) for place in at]


def nibbles(data: Tensor, run: int, codes: Tensor, scratch: Scratch) -> None:
    """`fields` of width 4, quicker, into float32 `codes` [n, 2 * bytes]: whole arrays at a time, none of them fresh."""
    codes = codes.view(len(data), -1, 2, run)
    data = data.unflatten(1, (-1, run))
    part = scratch.array("part", *data.shape, dtype=torch.uint8)
    codes[:, :, 0] = torch.bitwise_and(data, 15, out=part)
    codes[:, :, 1] = torch.bitwise_right_shift(data, 4, out=part)


def half_bytes(values: Tensor) -> Tensor:
    """float [n], exact in float16, as its two bytes: uint8 [n, 2]."""
    return values.half().view(-1, 1).view(torch.uint8)


def fields(data: Tensor, width: int, run: int) -> Tensor:
    """Unsigned fields of `width` bits, lowest first, of each run of `run` bytes: uint8 [n, runs, 8 / width, run].

    With width 4 and run 16: the 16 low nibbles, then the 16 high nibbles, of every 16 bytes. One shift for all bytes
    at a time: broadcasting over short runs takes four times as long.
    """
    data = data.contiguous().view(len(data), -1, run)
    mask = 2**width - 1
    return torch.stack([(data >> shift) & mask if shift else data & mask for shift in range(0, 8, width)], dim=2)


def join(values: Tensor, width: int, run: int) -> Tensor:
    """The inverse of `fields`: uint8 values [n, anything], in its order, packed into uint8 [n, bytes]."""
    count = 8 // width
    parts = values.reshape(len(values), -1, count, run)
    data = parts[:, :, 0].clone()
    for index in range(1, count):
        data |= parts[:, :, index] << (width * index)
    return data.view(len(values), -1)
