"""A placement and where its tensors come from in, what a serialized model is written from out. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from math import prod

import torch
from torch import Tensor

from pixtral_cli.model.kernels.int4 import Int4Linear
from pixtral_cli.model.kernels.nf4 import NF4Linear
from pixtral_cli.model.kernels.reference import PackedEmbedding, PackedLinear
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.load import DTYPES
from pixtral_cli.model.placement import Placement
from weights_cache import codecs
from weights_cache.checkpoint import Checkpoint
from weights_cache.codecs import nf4
from weights_cache.codecs.int4 import SCALES, Int4, fits, stored_shapes
from weights_cache.codecs.nf4 import NF4, ROWS
from weights_cache.formats.serialized import DTYPE_WORDS, Weight
from weights_cache.names import EMBEDDING

WORDS = {"float32": "F32", "bfloat16": "BF16"}


def weights(
    checkpoint: Checkpoint, names: Iterable[str], placement: Placement, tensor_of: Callable[[str], Tensor | NF4 | Int4]
) -> list[Weight]:
    """What to write for each tensor; `tensor_of(name)` gives its stored form when its turn comes."""

    @lru_cache(maxsize=1)
    def ordered(name: str) -> NF4 | Int4:
        """Once for all of its parts, which are written one after the other."""
        return _ordered(tensor_of(name), placement.encodings[name])

    found: list[Weight] = []
    for name in names:
        encoding, shape = placement.encodings[name], checkpoint.tensors[name].shape
        if encoding == "nf4":
            found += _nf4_weights(checkpoint, name, placement.double_quantization, ordered)
        elif name != EMBEDDING and fits(encoding, shape[0]):
            found += _int4_weights(name, encoding, shape, ordered)
        else:
            found.append(_weight(name, encoding, shape, tensor_of))
    return found


def _ordered(weight: Tensor | NF4 | Int4, encoding: str) -> NF4 | Int4:
    """In the order of the CPU's kernel where its rows allow, so that loading need not make it."""
    if isinstance(weight, Tensor):
        return Int4.from_rows(encoding, weight)
    if isinstance(weight, Int4):
        return weight
    return weight.interleaved() if weight.shape[0] % ROWS == 0 else weight.in_rows()


def _nf4_weights(checkpoint: Checkpoint, name: str, double: bool, ordered: Callable[[str], NF4 | Int4]) -> list[Weight]:
    """The codes under the matrix's own name, and what else it is made of as tensors of their own."""
    rows, columns = shape = checkpoint.tensors[name].shape
    codes = (rows // ROWS, columns // 2, ROWS) if rows % ROWS == 0 else (rows, columns // 2)
    if checkpoint.tensors[name].encoding == "nf4":
        parts = checkpoint.nf4(name).to_tensors(name)
        beside = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items() if part != name}
    else:
        parts = nf4.parts_beside(-(-rows * columns // nf4.BLOCK), double)
        beside = {f"{name}.{part}": (dtype, (count,)) for part, (dtype, count) in parts.items()}

    def make(part: str) -> Tensor:
        return ordered(name).to_tensors(name)[part]

    found = []
    for part, (dtype, stored) in {name: (torch.uint8, codes), **beside}.items():
        word = str(dtype).removeprefix("torch.")
        encoding, true = ("nf4", shape) if part == name else (word, stored)
        nbytes = prod(stored) * dtype.itemsize
        found.append(Weight(part, encoding, true, DTYPE_WORDS[str(dtype)], stored, nbytes, partial(make, part)))
    return found


def _int4_weights(
    name: str, encoding: str, shape: tuple[int, ...], ordered: Callable[[str], NF4 | Int4]
) -> list[Weight]:
    """The codes under the matrix's own name, and the scales beside them."""

    def make(part: str) -> Tensor:
        return ordered(name).to_tensors(name)[part]

    codes, scales = stored_shapes(encoding, *shape)
    beside = name + SCALES
    return [
        Weight(name, encoding, shape, "U8", codes, prod(codes), partial(make, name)),
        Weight(beside, "uint8", scales, "U8", scales, prod(scales), partial(make, beside)),
    ]


def _weight(name: str, encoding: str, shape: tuple[int, ...], tensor_of: Callable[[str], Tensor]) -> Weight:
    if encoding in DTYPES:
        stored, dtype, width = shape, WORDS[encoding], DTYPES[encoding].itemsize
    else:
        stored, dtype, width = (shape[0], codecs.get(encoding).encoding.row_bytes(shape[1])), "U8", 1
    return Weight(name, encoding, shape, dtype, stored, prod(stored) * width, lambda: tensor_of(name))


def loaded(model: LanguageModel, name: str) -> Tensor | NF4 | Int4:
    """The stored form of a tensor of a loaded model, on the CPU."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if isinstance(layer, NF4Linear) and leaf == "weight":
        return layer.weight.to(torch.device("cpu"))
    if isinstance(layer, Int4Linear) and leaf == "weight":
        return layer.weight
    packed = isinstance(layer, PackedLinear | PackedEmbedding) and leaf == "weight"
    return (layer.packed if packed else getattr(layer, leaf)).detach().cpu()
