"""bitsandbytes' NF4: 4-bit codes and the scales of their blocks in, weights out, exactly. Knows no file and no kernel.

A matrix is flattened and cut into blocks of 64 weights; a weight is TABLE[code] times the largest magnitude of its
block. With double quantisation these magnitudes are bytes themselves, in blocks of 256 (Dettmers et al., QLoRA,
2023, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from weights_cache.encodings import ENCODINGS

BLOCK = ENCODINGS["nf4"].block
"""What bitsandbytes takes unless told otherwise."""
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Every size of block that it knows."""
NESTED_BLOCK = 256
CHUNK = 2**18  # weights decoded at a time: a multiple of every block, and small enough for a core's cache

TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What the 16 codes stand for: quantiles of a normal distribution, with an exact zero (QLoRA, appendix E)."""


@cache
def _pairs(device: torch.device) -> Tensor:
    """[256, 2]: the two weights of each byte. Made once: a copy to a card would wait for it."""
    return torch.cartesian_prod(*2 * [torch.tensor(TABLE, device=device)])


@dataclass(frozen=True, eq=False)
class NF4:
    """A matrix [R, C] in NF4; C is even.

    `codes` are uint8 [R, C/2], two weights a byte and the first of them in the high half. `absmax` is float32
    [blocks]; with double quantisation it is uint8, and a block's magnitude is nested_quant_map[absmax] (float32 [256])
    times its nested_absmax (float32, one for 256 blocks) plus nested_offset (float32 [1]).
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    nested_quant_map: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def encoding(self) -> str:
        return "nf4"

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), 2 * self.codes.shape[1]

    @property
    def block(self) -> int:
        """Weights that share a magnitude. A matrix of less than one block can be said to have blocks of any size."""
        weights, blocks = math.prod(self.shape), self.absmax.numel()
        return next(size for size in BLOCKS if math.ceil(weights / size) == blocks)

    @property
    def nested(self) -> bool:
        """Whether the magnitudes are quantised too."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.tensors().values())

    def magnitudes(self) -> Tensor:
        """The largest magnitude of each block, float32 [blocks]."""
        if self.nested_absmax is None or self.nested_quant_map is None or self.nested_offset is None:
            return self.absmax
        units = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: self.absmax.numel()]
        return self.nested_quant_map[self.absmax.int()] * units + self.nested_offset

    def unnested(self) -> NF4:
        """The same weights with float32 magnitudes, which take 4.5 bits a weight instead of 4.13."""
        return NF4(self.codes, self.magnitudes())

    @torch.no_grad()
    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [R, C]: bit for bit what bitsandbytes' `dequantize_4bit` makes of them in that dtype."""
        shape, block = self.shape, self.block
        codes, magnitudes = self.codes.flatten(), self.magnitudes()
        codes = pad(codes, (0, magnitudes.numel() * block // 2 - codes.numel()))  # a last block may be cut off
        pairs = _pairs(codes.device)
        weights = torch.empty(len(magnitudes), block, dtype=dtype, device=codes.device)
        step = CHUNK // block
        for start in range(0, len(magnitudes), step):
            part = codes[start * block // 2 : (start + step) * block // 2]
            units = magnitudes[start : start + step, None]
            weights[start : start + step] = embedding(part.int(), pairs).view(-1, block) * units
        return weights.flatten()[: math.prod(shape)].view(shape)

    def to(self, device: torch.device) -> NF4:
        return NF4(**{name: part.to(device) for name, part in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The codes, and what stands beside them, as far as it is there."""
        return {part.name: tensor for part in fields(self) if (tensor := getattr(self, part.name)) is not None}


def has_whole_blocks(weight: NF4) -> bool:
    """Whether no block is cut off at the end and magnitudes are plain: other rows may then follow."""
    return not weight.nested and weight.absmax.numel() * weight.block == math.prod(weight.shape)


def beside(
    rows: int, columns: int, *, block: int = BLOCK, nested: bool = False
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of what stands beside the codes of a matrix in NF4."""
    blocks = math.ceil(rows * columns / block)
    if not nested:
        return {"absmax": (torch.float32, (blocks,))}
    return {
        "absmax": (torch.uint8, (blocks,)),
        "nested_absmax": (torch.float32, (math.ceil(blocks / NESTED_BLOCK),)),
        "nested_quant_map": (torch.float32, (256,)),
        "nested_offset": (torch.float32, (1,)),
    }
