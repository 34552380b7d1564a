"""Rows of q4_k or q4_0 in, the same in the order of torch's 4-bit kernel for the CPU out, and back. Knows no file.

That kernel (`torch.ops.aten._weight_int4pack_mm_for_cpu`) takes a weight for (code - 8) * scale + zero, with bfloat16
scales and zeros for every 32 columns. Letters: R rows, C columns, S blocks in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from weights_cache.encodings import ENCODINGS, Encoding

from .k_quants import six_bit_words
from .packed_rows import PackedRows

ROWS = ENCODINGS["q4_k"].kernel_rows
"""Rows that lie together in the order of the kernel, where the processor has AVX-512."""
GROUP = 32
"""Columns that share a scale and a zero."""
CHUNK = 2**19  # codes put into order at a time: they stay in a core's cache
SCALED = 2**14  # blocks whose scales are computed at a time, for the same reason


class Layout(NamedTuple):
    """A block has `header` bytes of scales, in words of `word` bytes; then nibbles, in planes of `run` bytes."""

    encoding: Encoding
    header: int
    word: int
    run: int


LAYOUTS = {"q4_0": Layout(ENCODINGS["q4_0"], 2, 2, 16), "q4_k": Layout(ENCODINGS["q4_k"], 16, 4, 32)}
WORDS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, eq=False)
class Int4:
    """A matrix [R, C] in q4_k or q4_0, every byte of it, with R a multiple of 64.

    `codes` are uint8 [R/64, C, 32]: of 64 rows, byte j of a column has the code of row j in its low and of row 32 + j
    in its high half. `scales` are the other bytes of the blocks, words of a kind together: uint8 [S, words, R, bytes
    of a word], which is [C/256, 4, R, 4] for q4_k and [C/32, 1, R, 2] for q4_0.
    """

    encoding: str
    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes) * ROWS, self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales}

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [R, C] as the codec decodes them."""
        return self.in_rows().decoded(dtype)

    def to(self, device: torch.device) -> Int4:
        return Int4(self.encoding, self.codes.to(device), self.scales.to(device))

    @classmethod
    def from_rows(cls, encoding: str, packed: Tensor) -> Int4:
        """`packed` is uint8 [R, bytes of a row], as the codec has it; it is copied."""
        layout = LAYOUTS[encoding]
        blocks = packed.unflatten(1, (-1, layout.encoding.block_bytes))
        words = blocks[..., : layout.header].contiguous().view(WORDS[layout.word])  # [R, S, words]
        scales = words.permute(1, 2, 0).contiguous().unsqueeze(3).view(torch.uint8)
        codes = torch.empty(len(packed) // ROWS, blocks.shape[1] * layout.encoding.block, ROWS // 2, dtype=torch.uint8)
        weight = cls(encoding, codes, scales)
        for part, lines in weight._parts(blocks):
            low, high = part.unbind(1)
            ordered = torch.empty(*low.shape[:-1], 2, layout.run, dtype=torch.uint8)
            torch.bitwise_or(low & 0xF, high << 4, out=ordered[..., 0, :])
            torch.bitwise_or(low >> 4, high & 0xF0, out=ordered[..., 1, :])
            lines.copy_(ordered.flatten(2))
        return weight

    def in_rows(self) -> PackedRows:
        """The same as the codec has it, copied: undoes `from_rows`."""
        layout = LAYOUTS[self.encoding]
        blocks = self.codes.new_empty(self.shape[0], len(self.scales), layout.encoding.block_bytes)
        blocks[..., : layout.header] = self.scales.permute(2, 0, 1, 3).flatten(2)
        for part, lines in self._parts(blocks):
            first, second = lines.contiguous().unflatten(2, (*part.shape[3:5], 2, layout.run)).unbind(-2)
            part[:, 0] = first & 0xF | second << 4
            part[:, 1] = first >> 4 | second & 0xF0
        return PackedRows(self.encoding, blocks.flatten(1))

    def _parts(self, blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of `blocks` [R, S, bytes] and of the same codes here, some at a time: n times 64 rows as
        [n, 2, 32, S, runs, run] of nibbles, and [n, 32, C]."""
        layout = LAYOUTS[self.encoding]
        nibbles = blocks[..., layout.header :].unflatten(-1, (-1, layout.run)).unflatten(0, (-1, 2, ROWS // 2))
        step = max(1, CHUNK // (ROWS * self.shape[1]))
        return zip(nibbles.split(step), self.codes.transpose(1, 2).split(step), strict=True)

    @torch.no_grad()
    def scales_and_zeros(self) -> Tensor:
        """What the kernel wants beside the codes: bfloat16 [C/32, R, 2], rounded from the exact ones."""
        rows, columns = self.shape
        found = torch.empty(columns // GROUP, rows, 2, dtype=torch.bfloat16)
        step = max(1, SCALED // rows)
        groups = LAYOUTS[self.encoding].encoding.block // GROUP
        compute = _q4_k if self.encoding == "q4_k" else _q4_0
        for part, words in zip(found.split(step * groups), self.scales.split(step), strict=True):
            compute(words, part.view(len(words), groups, rows, 2))
        return found


def beside(encoding: str, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of what stands beside the codes of a matrix in kernel order."""
    layout = LAYOUTS[encoding]
    scales = (columns // layout.encoding.block, layout.header // layout.word, rows, layout.word)
    return {"scales": (torch.uint8, scales)}


def _q4_0(words: Tensor, found: Tensor) -> None:
    """scale * (code - 8): there is no zero. uint8 [S, 1, R, 2] into bfloat16 [S, 1, R, 2]."""
    found[..., 0] = words.view(torch.float16)[..., 0]
    found[..., 1] = 0


def _q4_k(words: Tensor, found: Tensor) -> None:
    """scale * code - offset is scale * (code - 8) + (8 scale - offset). uint8 [S, 4, R, 4] into [S, 8, R, 2]."""
    steps, first, second, third = words.view(torch.int32)[..., 0].unbind(1)  # [S, R]
    scale_step, offset_step = steps.contiguous().view(torch.float16).float().unflatten(1, (-1, 2)).unbind(2)
    packed = torch.stack(six_bit_words(first, second, third), 1).view(torch.uint8).unflatten(2, (-1, 4))
    fields = torch.empty(len(words), 4, 4, words.shape[2]).copy_(packed.transpose(2, 3))
    scales, offsets = fields.view(len(words), 2, 8, -1).unbind(1)
    found[..., 0] = scales.mul_(scale_step.unsqueeze(1))
    found[..., 1] = offsets.mul_(offset_step.unsqueeze(1)).neg_().add_(scales, alpha=8)
