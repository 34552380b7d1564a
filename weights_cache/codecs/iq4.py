"""Four-bit codes that name one of 16 unevenly spaced values: iq4_nl, iq4_xs. Decoded only.

The values are denser around zero, where most weights are. iq4_nl is a block of 32: a float16 scale d, then 16 bytes
of nibbles as in q4_0; a weight is d * VALUES[code]. iq4_xs is a super-block of 256 in 136 bytes: d, one 16-bit word
with the two upper bits of eight scales, four bytes with their lower nibbles, 8 x 16 bytes of nibbles; group g of 32
has the scale s - 32, s being its six bits, and a weight is (d * (s - 32)) * VALUES[code].

Worked: in iq4_nl with d = 0.5, the code byte 0x80 gives weight 0 the code 0, which is 0.5 * -127 = -63.5, and weight
16 the code 8, which is 0.5 * 1 = 0.5.
Source: ggml's ggml-common.h (block_iq4_nl, block_iq4_xs) and gguf-py's quants.py (the values: IQ4_NL.kvalues).
"""

from functools import cache

import torch
from torch import Tensor

from weights_cache.encodings import ENCODINGS

from . import bits
from .bits import Scratch
from .codec import BlockCodec, Codec

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
GROUP = 32
SUPER = 256


@cache
def _table(device: torch.device) -> Tensor:
    """VALUES, made once: a copy from the computer's memory would wait for a card, and cannot be in a CUDA graph."""
    return torch.tensor(VALUES, dtype=torch.float32, device=device)


def _values(data: Tensor) -> Tensor:
    """The values that the nibbles of each run of 16 bytes name: float32 [n, 2 * bytes]."""
    codes = bits.fields(data, 4, GROUP // 2)
    return _table(data.device).index_select(0, codes.flatten().int()).view(len(data), -1)


def _iq4_nl_scales(blocks: Tensor) -> tuple[Tensor, None]:
    return bits.half(blocks, 0), None


def _iq4_nl_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    codes.copy_(_values(blocks[:, 2:]))


def _iq4_xs_scales(blocks: Tensor) -> tuple[Tensor, None]:
    upper = bits.fields(blocks[:, 2:4], 2, 1).view(-1, 8)
    lower = bits.fields(blocks[:, 4:8], 4, 1).view(-1, 8)
    return (lower | (upper << 4)).float().sub_(32).mul_(bits.half(blocks, 0)), None


def _iq4_xs_codes(blocks: Tensor, codes: Tensor, scratch: Scratch) -> None:
    codes.copy_(_values(blocks[:, 8:]))


CODECS: tuple[Codec, ...] = (
    BlockCodec(ENCODINGS["iq4_nl"], _iq4_nl_scales, _iq4_nl_codes),
    BlockCodec(ENCODINGS["iq4_xs"], _iq4_xs_scales, _iq4_xs_codes),
)
