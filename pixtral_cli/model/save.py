"""A placement and where its weights come from in, what a serialized model is written from out. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from math import prod

import torch
from torch import Tensor

from pixtral_cli.model.kernels import Weight
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.load import DTYPES
from pixtral_cli.model.placement import Placement
from weights_cache.checkpoint import Checkpoint
from weights_cache.codecs import int4, nf4
from weights_cache.codecs.int4 import Int4, fits
from weights_cache.codecs.nf4 import NF4
from weights_cache.encodings import ENCODINGS
from weights_cache.formats import serialized
from weights_cache.names import EMBEDDING
from weights_cache.packed import PackedRows

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The tensors that one weight is in a file: name, dtype and shape of each; the first has the weight's own name."""


def weights(
    checkpoint: Checkpoint, names: Iterable[str], placement: Placement, weight_of: Callable[[str], Weight]
) -> list[serialized.Weight]:
    """What to write of each weight; `weight_of(name)` gives it in its encoding when its turn comes.

    What the CPU's 4-bit kernels can take is written in their order, so that loading need not make it.
    """

    def tensors(name: str) -> Mapping[str, Tensor]:
        return _tensors(name, weight_of(name))

    encoded_once = lru_cache(maxsize=1)(tensors)  # a weight's tensors are written one after the other
    found = []
    for name in names:
        layout = _layout(checkpoint, name, placement)
        made = encoded_once if len(layout) > 1 else tensors
        for part, (dtype, stored) in layout.items():
            encoding, shape = str(dtype).removeprefix("torch."), stored
            if part == name:
                encoding, shape = placement.encodings[name], checkpoint.tensors[name].shape
            word, nbytes = serialized.DTYPE_WORDS[str(dtype)], prod(stored) * dtype.itemsize
            found.append(
                serialized.Weight(part, encoding, shape, word, stored, nbytes, partial(_part, made, name, part))
            )
    return found


def _part(tensors: Callable[[str], Mapping[str, Tensor]], name: str, part: str) -> Tensor:
    return tensors(name)[part]


def _layout(checkpoint: Checkpoint, name: str, placement: Placement) -> Layout:
    encoding, shape = placement.encodings[name], checkpoint.tensors[name].shape
    if encoding in DTYPES:
        return {name: (DTYPES[encoding], shape)}
    if encoding == "nf4":
        return _nf4_layout(checkpoint, name, placement.double_quantization)
    if _is_reordered(name, encoding, shape[0]):
        codes, scales = int4.stored_shapes(encoding, *shape)
        return {name: (torch.uint8, codes), name + int4.SCALES: (torch.uint8, scales)}
    return {name: (torch.uint8, (shape[0], ENCODINGS[encoding].row_bytes(shape[1])))}


def _nf4_layout(checkpoint: Checkpoint, name: str, double_quantization: bool) -> Layout:
    rows, columns = checkpoint.tensors[name].shape
    codes = (rows // nf4.ROWS, columns // 2, nf4.ROWS) if rows % nf4.ROWS == 0 else (rows, columns // 2)
    if checkpoint.tensors[name].encoding == "nf4":
        stored = checkpoint.nf4(name).to_tensors(name).items()
        beside = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in stored if part != name}
    else:
        parts = nf4.parts_beside(-(-rows * columns // nf4.BLOCK), double_quantization)
        beside = {f"{name}.{part}": (dtype, (count,)) for part, (dtype, count) in parts.items()}
    return {name: (torch.uint8, codes), **beside}


def _tensors(name: str, weight: Weight) -> Mapping[str, Tensor]:
    """The tensors of `_layout`."""
    if isinstance(weight, Tensor):
        return {name: weight}
    if isinstance(weight, NF4):
        return (weight.interleaved() if weight.shape[0] % nf4.ROWS == 0 else weight.in_rows()).to_tensors(name)
    if isinstance(weight, PackedRows) and not _is_reordered(name, weight.encoding, weight.shape[0]):
        return {name: weight.rows}
    ordered = Int4.from_rows(weight.encoding, weight.rows) if isinstance(weight, PackedRows) else weight
    assert isinstance(ordered, Int4), f"{name} is {type(weight).__name__}"
    return ordered.to_tensors(name)


def _is_reordered(name: str, encoding: str, rows: int) -> bool:
    """The table of embeddings is not, for its rows are looked up."""
    return name != EMBEDDING and fits(encoding, rows)


def loaded(model: LanguageModel, name: str) -> Weight:
    """The weight that a loaded model has under `name`, on the CPU."""
    path, _, leaf = name.rpartition(".")
    weight: Weight = getattr(model.get_submodule(path), leaf)
    return (weight.detach() if isinstance(weight, Tensor) else weight).to(torch.device("cpu"))
