"""Rows of weights or of packed bytes in, the other out, chunk by chunk. Knows no layout."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from weights_cache.encodings import Encoding
from weights_cache.errors import NotEncodable

from . import bits
from .bits import Scratch

CHUNK_WEIGHTS = 2**17
"""Weights per chunk and thread: half a MiB in float32, so that a few arrays of them stay in a core's cache.
Decoding has fewer arrays, and takes two of them at a time."""
MAX_CHUNK_WEIGHTS = 2**20
"""However many threads there are, the temporary arrays stay within a few dozen MiB."""
SCALED_WEIGHTS = 2**22
"""Weights whose scales are computed at a time: small arrays, whose cost is that of calling torch."""


@dataclass(frozen=True)
class Codec(ABC):
    """Rows of weights in one encoding, one block after the other, and back to weights."""

    encoding: Encoding

    @property
    def name(self) -> str:
        return self.encoding.name

    @property
    def encodes(self) -> bool:
        """Whether weights can be put into this encoding, rather than only taken out of it."""
        return True

    @abstractmethod
    def decode(self, data: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The weights [..., columns] that the bytes `data`, uint8 [..., row_bytes], stand for.

        Exact in float32: bit for bit gguf-py's `dequantize`, infinities included (where the bytes say "not a number"
        there is a NaN, but which of the many is not specified). A narrower `dtype` rounds that once. They are written
        into `out`, where that is given: contiguous and of their shape, its dtype counts. A third of the time of
        decoding into fresh memory is the system's, for handing it out.
        Raises WidthNotDivisible when a row is no whole number of blocks.
        """

    @abstractmethod
    def encode(self, weights: Tensor) -> Tensor:
        """`weights`, floats of any precision [..., columns], as packed bytes, uint8 [..., row_bytes].

        Memory beyond the result is a few dozen MiB at most, and a copy of `weights` when they are not contiguous.
        Weights beyond the reach of a float16 scale are laid on the largest value that there is.
        Raises WidthNotDivisible; NotEncodable when there is no encoder, or weights that are infinite or no number.
        """


@dataclass(frozen=True)
class BlockCodec(Codec):
    """Blocks of codes in groups: a weight is its code times the scale of its group, less the group's offset.

    `scales` takes uint8 [n, block_bytes] and gives scales and offsets, float32 [n, groups], the latter None where all
    are 0; `codes` writes the codes into a float32 [n, block]; `pack` makes the bytes of a float32 [n, block].
    """

    scales: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    codes: Callable[[Tensor, Tensor, Scratch], None]
    pack: Callable[[Tensor, Scratch], Tensor] | None = None

    @property
    def encodes(self) -> bool:
        return self.pack is not None

    @torch.no_grad()
    def decode(self, data: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        assert data.dtype == torch.uint8, f"packed weights are uint8, not {data.dtype}"
        shape = (*data.shape[:-1], self.encoding.columns(data.shape[-1]))
        out = torch.empty(shape, dtype=dtype, device=data.device) if out is None else out
        assert out.shape == shape, f"{shape} weights do not fit into {tuple(out.shape)}"
        blocks = bits.aligned(data.reshape(-1, self.encoding.block_bytes), math.gcd(self.encoding.block_bytes, 4))
        weights = out.view(-1, self.encoding.block)
        scratch = Scratch(data.device)
        at_once = SCALED_WEIGHTS // self.encoding.block
        for some, found in zip(blocks.split(at_once), weights.split(at_once), strict=True):
            self._decode(some, found, scratch)
        return out

    def _decode(self, blocks: Tensor, weights: Tensor, scratch: Scratch) -> None:
        """Scales for all blocks at once, for they are small; then the codes, as many as stay in the cache."""
        scales, offsets = self.scales(blocks)
        for part in self._parts(len(blocks), 2 * CHUNK_WEIGHTS):
            rounded = weights[part]
            exact = rounded if rounded.dtype == torch.float32 else scratch.array("weights", *rounded.shape)
            self.codes(blocks[part], exact, scratch)
            grouped = exact.view(*scales[part].shape, -1).mul_(scales[part].unsqueeze(2))
            if offsets is not None:
                grouped.sub_(offsets[part].unsqueeze(2))
            if exact is not rounded:
                rounded.copy_(exact)

    @torch.no_grad()
    def encode(self, weights: Tensor) -> Tensor:
        if self.pack is None:
            raise NotEncodable(self.name, "they can only be decoded from it")
        assert weights.is_floating_point(), f"weights are floating-point numbers, not {weights.dtype}"
        shape = (*weights.shape[:-1], self.encoding.row_bytes(weights.shape[-1]))
        blocks = weights.reshape(-1, self.encoding.block)
        data = torch.empty(len(blocks), self.encoding.block_bytes, dtype=torch.uint8, device=weights.device)
        scratch = Scratch(weights.device)
        for part in self._parts(len(blocks), CHUNK_WEIGHTS):
            chunk = scratch.array("chunk", *blocks[part].shape).copy_(blocks[part])
            if not all(map(math.isfinite, (chunk.amin(), chunk.amax()))):
                raise NotEncodable(self.name, "some of them are infinite or not a number")
            data[part] = self.pack(chunk, scratch)
        return data.view(shape)

    def _parts(self, blocks: int, weights: int) -> Iterator[slice]:
        size = min(weights * torch.get_num_threads(), MAX_CHUNK_WEIGHTS) // self.encoding.block
        return (slice(begin, begin + size) for begin in range(0, blocks, size))
