"""What a weight is that stays in its encoding: `PackedWeight`, which all of codecs/ that keep one follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .codecs import fp8, nf4
from .codecs.fp8 import FP8
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

    def to(self, device: torch.device) -> PackedWeight:
        """The same weight with all parts on `device`."""


def parts(
    encoding: str, shape: tuple[int, int], *, block: int = nf4.BLOCK, nested: bool = False, scales: int = 1
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of each of `tensors()` before there is a weight.

    `block` and `nested` are of nf4: the weights that share a magnitude, and whether the magnitudes are quantised too.
    `scales` are of fp8: how many a row has.
    """
    stored = ENCODINGS[encoding].stored_shape(*shape)
    assert stored is not None, f"rows of {shape[1]} weights are none of {encoding}"
    if encoding == "nf4":
        return {"codes": (torch.uint8, stored), **nf4.beside(*shape, block=block, nested=nested)}
    if encoding == "fp8":
        return {"codes": (torch.uint8, stored), **fp8.beside(*shape, scales)}
    return {"rows": (torch.uint8, stored)}


def from_parts(
    encoding: str, shape: tuple[int, int], first: Tensor, beside: Mapping[str, Tensor]
) -> PackedWeight | None:
    """The weight of that encoding and shape whose `tensors()` these are; None if they cannot be."""
    tensors = {"codes" if encoding in ("nf4", "fp8") else "rows": first, **beside}
    found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}
    if encoding == "fp8":
        scales = tensors["scales"].shape[-1] if "scales" in tensors else 1
        fits = found == parts(encoding, shape, scales=scales) and fp8.block_of(shape[1], scales)
        return FP8(**tensors) if fits else None
    if found not in (parts(encoding, shape, block=block, nested=len(beside) > 1) for block in nf4.BLOCKS):
        return None
    return NF4(**tensors) if encoding == "nf4" else PackedRows(encoding, **tensors)


def joined(weights: Sequence[Tensor | PackedWeight]) -> Tensor | PackedWeight | None:
    """The matrix that has the rows of all; None where encodings differ, or nf4's blocks are not whole or its magnitudes
    quantised for each matrix by itself."""
    if tensors := [each for each in weights if isinstance(each, Tensor)]:
        same = len(tensors) == len(weights) and len({tensor.dtype for tensor in tensors}) == 1
        return torch.cat(tensors) if same else None
    if alike := [each for each in weights if isinstance(each, PackedRows)]:
        same = len(alike) == len(weights) and len({each.encoding for each in alike}) == 1
        return PackedRows(alike[0].encoding, torch.cat([each.rows for each in alike])) if same else None
    if scaled := [each for each in weights if isinstance(each, FP8)]:
        same = len(scaled) == len(weights) and len({each.scales.shape[1] for each in scaled}) == 1
        return (
            FP8(*(torch.cat(parts) for parts in zip(*((w.codes, w.scales) for w in scaled), strict=True)))
            if same
            else None
        )
    nf4s = [each for each in weights if isinstance(each, NF4)]
    if len(nf4s) < len(weights) or not all(map(nf4.has_whole_blocks, nf4s)) or len({each.block for each in nf4s}) > 1:
        return None
    return NF4(torch.cat([each.codes for each in nf4s]), torch.cat([each.absmax for each in nf4s]))


def with_rows(weight: Tensor | PackedWeight, change: Callable[[Tensor], Tensor]) -> Tensor | PackedWeight:
    """The weight that has the rows which `change` chooses, or puts into another order, of each of its parts. Not for
    nf4, whose blocks go over the ends of rows."""
    if isinstance(weight, Tensor):
        return change(weight)
    assert isinstance(weight, PackedRows | FP8), f"{weight.encoding} has no rows"
    return weight.with_rows(change)


def rows_of(weight: Tensor | PackedWeight, first: int, end: int) -> Tensor | PackedWeight:
    """The rows [first, end) of a weight: a view of a tensor, and of what `joined` gave what was joined."""
    if not isinstance(weight, NF4):
        return with_rows(weight, lambda part: part[first:end])
    columns, block = weight.shape[1], weight.block
    return NF4(weight.codes[first:end], weight.absmax[first * columns // block : end * columns // block])


def plain(weight: Tensor | PackedWeight) -> Tensor:
    """Any weight as ordinary numbers: what is packed is decoded to float32."""
    return weight if isinstance(weight, Tensor) else weight.decoded()
