"""Codes in the orders that files of versions 1 and 2 may have them in, in; the same weights row by row, copied, out.

Those files lie as 4-bit kernels for CPUs read them, some rows together: torch's (q4_0 and q4_k, in version 2) or
bitsandbytes' (nf4, in both). The codes of such a matrix have three dimensions. Nothing writes these orders any more.
Letters: R rows, C columns, S blocks in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from weights_cache.encodings import ENCODINGS

if TYPE_CHECKING:
    from torch import Tensor

    from weights_cache.packed import PackedWeight

ROWS_TOGETHER = {"q4_0": 64, "q4_k": 64, "nf4": 32}
CHUNK = 2**19  # codes put into order at a time: they stay in a core's cache


class Layout(NamedTuple):
    """A block has `header` bytes of scales, in words of `word` bytes; then two codes a byte, in planes of `run` bytes:
    the low halves are `run` columns, the high ones those after them."""

    header: int
    word: int
    run: int


LAYOUTS = {"q4_0": Layout(2, 2, 16), "q4_k": Layout(16, 4, 32)}


def codes_shape(encoding: str, rows: int, columns: int) -> tuple[int, int, int] | None:
    """The shape of a matrix's codes in the older order, 32 bytes together: those of 64 rows of a column (q4_0, q4_k),
    or of 32 rows of two columns (nf4). None where it cannot lie so."""
    together = ROWS_TOGETHER.get(encoding)
    if not together or rows % together or not rows * columns or not ENCODINGS[encoding].stored_shape(rows, columns):
        return None
    return rows // together, columns * together // 64, 32


def scales_shape(encoding: str, rows: int, columns: int) -> tuple[int, int, int, int]:
    """The shape of the bytes beside the codes of q4_0 or q4_k, words of a kind together: [S, words, R, word]."""
    layout = LAYOUTS[encoding]
    return columns // ENCODINGS[encoding].block, layout.header // layout.word, rows, layout.word


def in_rows(encoding: str, shape: tuple[int, int], codes: Tensor, beside: Mapping[str, Tensor]) -> PackedWeight | None:
    """The weight of that encoding and shape, as its codec has it; None if its parts cannot be these."""
    import torch

    from weights_cache import packed

    if encoding == "nf4":
        return packed.from_parts(encoding, shape, _nf4_rows(codes), beside)
    found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in beside.items()}
    if found != {"scales": (torch.uint8, scales_shape(encoding, *shape))}:
        return None
    return packed.from_parts(encoding, shape, _block_rows(encoding, codes, beside["scales"]), {})


def _nf4_rows(codes: Tensor) -> Tensor:
    """uint8 [R/32, C/2, 32] -> [R, C/2], the first code of a byte in its high half.

    Of 32 rows, byte j of a pair of columns has codes of rows j//2 (low half) and 16 + j//2 (high half): of the pair's
    first column where j is even, of its second where it is odd.
    """
    import torch

    rows = codes.new_empty(len(codes), 2, 16, codes.shape[1])
    step = max(1, CHUNK // codes[0].numel())
    for part, some in zip(rows.split(step), codes.split(step), strict=True):
        first, second = some.unflatten(2, (16, 2)).permute(3, 0, 2, 1).contiguous()  # each [n, 16, C/2]
        torch.bitwise_or(first << 4, second & 0xF, out=part[:, 0])
        torch.bitwise_or(first & 0xF0, second >> 4, out=part[:, 1])
    return rows.flatten(0, 2)


def _block_rows(encoding: str, codes: Tensor, scales: Tensor) -> Tensor:
    """Codes uint8 [R/64, C, 32] and their scales -> uint8 [R, bytes of a row].

    Of 64 rows, byte j of a column has the code of row j in its low half, and of row 32 + j in its high half.
    """
    layout = LAYOUTS[encoding]
    blocks = codes.new_empty(64 * len(codes), len(scales), ENCODINGS[encoding].block_bytes)
    blocks[..., : layout.header] = scales.permute(2, 0, 1, 3).flatten(2)
    for part, some in _parts(blocks[..., layout.header :], codes, layout.run):
        low, high = some.unbind(-2)  # columns of a block that share bytes there
        part[:, 0] = low & 0xF | high << 4
        part[:, 1] = low >> 4 | high & 0xF0
    return blocks.flatten(1)


def _parts(bytes_: Tensor, codes: Tensor, run: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The codes' bytes of rows in blocks as [n, 2, 32, S, planes, run], and the same codes as they lie in the file, as
    [n, 32, S, planes, 2, run]: some rows at a time."""
    planes = bytes_.unflatten(-1, (-1, run)).unflatten(0, (-1, 2, 32))
    step = max(1, CHUNK // codes[0].numel())
    for part, some in zip(planes.split(step), codes.split(step), strict=True):
        yield part, some.transpose(1, 2).contiguous().unflatten(2, (*part.shape[3:5], 2, run))
