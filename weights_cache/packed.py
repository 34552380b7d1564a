"""What a weight is that stays in its encoding: `PackedWeight`, which all of codecs/ that keep one follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .codecs import int4, nf4
from .codecs.int4 import Int4
from .codecs.nf4 import NF4
from .codecs.packed_rows import PackedRows
from .encodings import ENCODINGS


@runtime_checkable
class PackedWeight(Protocol):
    """A matrix [out, in] that is kept in an encoding and decoded when it is used.

    A kernel is chosen by its type and `encoding`; any of them can be decoded. Nothing here copies what a file maps.
    """

    @property
    def encoding(self) -> str:
        """The encoding's name ("q4_k", "nf4"), as in `encodings.py`."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""

    def tensors(self) -> dict[str, Tensor]:
        """Its parts, as they are stored; the first of them goes by the weight's own name in a file."""

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in]: exact in float32, rounded once in a narrower dtype."""

    def in_rows(self) -> PackedWeight:
        """The same weight row by row as its codec has it, whatever kernel it was put in order for."""

    def to(self, device: torch.device) -> PackedWeight:
        """The same weight with all parts on `device`."""


def in_kernel_order(weight: PackedWeight) -> PackedWeight:
    """The same weight in the order of the CPU's 4-bit kernel, copied; as it is where it has none."""
    if not ENCODINGS[weight.encoding].has_kernel_order(weight.shape[0]):
        return weight
    if isinstance(weight, NF4):
        return weight.interleaved()
    return Int4.from_rows(weight.encoding, weight.rows) if isinstance(weight, PackedRows) else weight


def parts(
    encoding: str, shape: tuple[int, int], *, kernel_order: bool, block: int = nf4.BLOCK, nested: bool = False
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of each of `tensors()` before there is a weight: in kernel order, where it has one.

    `block` and `nested` are of nf4: the weights that share a magnitude, and whether the magnitudes are quantised too.
    """
    kernel_order = kernel_order and ENCODINGS[encoding].has_kernel_order(shape[0])
    stored = ENCODINGS[encoding].stored_shape(*shape, kernel_order=kernel_order)
    assert stored is not None, f"rows of {shape[1]} weights are none of {encoding}"
    if encoding == "nf4":
        return {"codes": (torch.uint8, stored), **nf4.beside(*shape, block=block, nested=nested)}
    if kernel_order:
        return {"codes": (torch.uint8, stored), **int4.beside(encoding, *shape)}
    return {"rows": (torch.uint8, stored)}


def from_parts(
    encoding: str, shape: tuple[int, int], first: Tensor, beside: Mapping[str, Tensor]
) -> PackedWeight | None:
    """The weight of that encoding and shape whose `tensors()` these are; None if they cannot be."""
    kernel_order, nested = first.ndim == 3, len(beside) > 1
    tensors = {"codes" if encoding == "nf4" or kernel_order else "rows": first, **beside}
    found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}
    sizes = (parts(encoding, shape, kernel_order=kernel_order, block=block, nested=nested) for block in nf4.BLOCKS)
    if found not in sizes:
        return None
    if encoding == "nf4":
        return NF4(**tensors)
    return Int4(encoding, **tensors) if kernel_order else PackedRows(encoding, **tensors)


def joined(weights: Sequence[Tensor | PackedWeight]) -> Tensor | PackedWeight | None:
    """The matrix that has the rows of all; None where encodings differ, or nf4's blocks are not whole or its magnitudes
    quantised for each matrix by itself."""
    rows = [weight if isinstance(weight, Tensor) else weight.in_rows() for weight in weights]
    if tensors := [each for each in rows if isinstance(each, Tensor)]:
        same = len(tensors) == len(rows) and len({tensor.dtype for tensor in tensors}) == 1
        return torch.cat(tensors) if same else None
    if alike := [each for each in rows if isinstance(each, PackedRows)]:
        same = len(alike) == len(rows) and len({each.encoding for each in alike}) == 1
        return PackedRows(alike[0].encoding, torch.cat([each.rows for each in alike])) if same else None
    nf4s = [each for each in rows if isinstance(each, NF4)]
    if len(nf4s) < len(rows) or not all(map(nf4.has_whole_blocks, nf4s)) or len({each.block for each in nf4s}) > 1:
        return None
    return NF4(torch.cat([each.codes for each in nf4s]), torch.cat([each.absmax for each in nf4s]))


def rows_of(weight: Tensor | PackedWeight, first: int, end: int) -> Tensor | PackedWeight:
    """The rows [first, end) of a weight: a view of a tensor, and of what `joined` gave what was joined."""
    if isinstance(weight, Tensor):
        return weight[first:end]
    rows = weight.in_rows()
    if isinstance(rows, PackedRows):
        return PackedRows(rows.encoding, rows.rows[first:end])
    assert isinstance(rows, NF4), f"{rows.encoding} has no rows"
    columns, block = rows.shape[1], rows.block
    return NF4(rows.codes[first:end], rows.absmax[first * columns // block : end * columns // block])


def plain(weight: Tensor | PackedWeight) -> Tensor:
    """Any weight as ordinary numbers: what is packed is decoded to float32."""
    return weight if isinstance(weight, Tensor) else weight.decoded()
