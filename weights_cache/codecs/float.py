"""Bytes that are floating-point numbers already: float32, float16, bfloat16, little-endian as in every format here.

Two bytes `80 3f` are the bfloat16 1.0, since 0x3f80 are the upper half of the float32 1.0.
Source: IEEE 754, and bfloat16 as its upper 16 bits (gguf-py's `quants.py`, class BF16).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from weights_cache.encodings import ENCODINGS

from . import bits
from .codec import Codec


@dataclass(frozen=True)
class FloatCodec(Codec):
    """Numbers of one dtype: nothing is packed, so the bytes are only looked at differently."""

    dtype: torch.dtype

    def decode(self, data: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """As Codec.decode; where `dtype` is the bytes' own, the result looks at the same memory."""
        assert data.dtype == torch.uint8, f"packed weights are uint8, not {data.dtype}"
        self.encoding.columns(data.shape[-1])
        weights = bits.aligned(data, self.encoding.block_bytes).view(self.dtype)
        return weights.to(dtype) if out is None else out.copy_(weights)

    @torch.no_grad()
    def encode(self, weights: Tensor) -> Tensor:
        """As Codec.encode, each number rounded to the nearest (ties to even); infinities and NaN are kept."""
        assert weights.is_floating_point(), f"weights are floating-point numbers, not {weights.dtype}"
        return weights.to(self.dtype).contiguous().view(torch.uint8)


CODECS: tuple[Codec, ...] = (
    FloatCodec(ENCODINGS["float32"], torch.float32),
    FloatCodec(ENCODINGS["float16"], torch.float16),
    FloatCodec(ENCODINGS["bfloat16"], torch.bfloat16),
)
