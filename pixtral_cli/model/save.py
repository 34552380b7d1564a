"""A placement and where its tensors come from in, what a serialized model is written from out. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from math import prod

import torch
from torch import Tensor

from pixtral_cli.model.linear import PackedEmbedding, PackedLinear
from pixtral_cli.model.llava import Llava
from pixtral_cli.model.load import DTYPES
from pixtral_cli.model.nf4 import NF4Linear
from pixtral_cli.model.placement import Placement
from weights_cache import codecs
from weights_cache.checkpoint import Checkpoint
from weights_cache.nf4 import BLOCK, NESTED_BLOCK, NF4, ROWS
from weights_cache.serialized import DTYPE_WORDS, Weight

WORDS = {"float32": "F32", "bfloat16": "BF16"}


def weights(
    checkpoint: Checkpoint, names: Iterable[str], placement: Placement, tensor_of: Callable[[str], Tensor | NF4]
) -> list[Weight]:
    """What to write for each tensor; `tensor_of(name)` gives its stored form when its turn comes."""

    @lru_cache(maxsize=1)
    def nf4_of(name: str) -> NF4:
        """Once for all of its parts, which are written one after the other."""
        return _ordered(tensor_of(name))

    found: list[Weight] = []
    for name in names:
        if placement.encodings[name] == "nf4":
            found += _nf4_weights(checkpoint, name, placement.double_quantization, nf4_of)
        else:
            found.append(_weight(checkpoint, name, placement.encodings[name], tensor_of))
    return found


def _ordered(weight: NF4) -> NF4:
    """In the order of the CPU's kernel where its rows allow, so that loading need not make it."""
    return weight.interleaved() if weight.shape[0] % ROWS == 0 else weight.in_rows()


def _nf4_weights(checkpoint: Checkpoint, name: str, double: bool, nf4_of: Callable[[str], NF4]) -> list[Weight]:
    """The codes under the matrix's own name, and what else it is made of as tensors of their own."""
    rows, columns = shape = checkpoint.tensors[name].shape
    codes = (rows // ROWS, columns // 2, ROWS) if rows % ROWS == 0 else (rows, columns // 2)
    if checkpoint.tensors[name].encoding == "nf4":
        parts = checkpoint.nf4(name).to_tensors(name)
        beside = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items() if part != name}
    else:
        beside = {f"{name}.{part}": size for part, size in _beside(-(-rows * columns // BLOCK), double).items()}

    def make(part: str) -> Tensor:
        return nf4_of(name).to_tensors(name)[part]

    found = []
    for part, (dtype, stored) in {name: (torch.uint8, codes), **beside}.items():
        word = str(dtype).removeprefix("torch.")
        encoding, true = ("nf4", shape) if part == name else (word, stored)
        nbytes = prod(stored) * dtype.itemsize
        found.append(Weight(part, encoding, true, DTYPE_WORDS[str(dtype)], stored, nbytes, partial(make, part)))
    return found


def _beside(blocks: int, double: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What stands beside the codes of so many blocks."""
    if not double:
        return {"absmax": (torch.float32, (blocks,))}
    return {
        "absmax": (torch.uint8, (blocks,)),
        "nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK),)),
        "nested_quant_map": (torch.float32, (256,)),
        "nested_offset": (torch.float32, (1,)),
    }


def _weight(checkpoint: Checkpoint, name: str, encoding: str, tensor_of: Callable[[str], Tensor]) -> Weight:
    shape = checkpoint.tensors[name].shape
    if encoding in DTYPES:
        stored, dtype, width = shape, WORDS[encoding], DTYPES[encoding].itemsize
    else:
        stored, dtype, width = (shape[0], codecs.get(encoding).row_bytes(shape[1])), "U8", 1
    return Weight(name, encoding, shape, dtype, stored, prod(stored) * width, lambda: tensor_of(name))


def loaded(model: Llava, name: str) -> Tensor | NF4:
    """The stored form of a tensor of a loaded model, on the CPU."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if isinstance(layer, NF4Linear) and leaf == "weight":
        return layer.weight.to(torch.device("cpu"))
    packed = isinstance(layer, PackedLinear | PackedEmbedding) and leaf == "weight"
    return (layer.packed if packed else getattr(layer, leaf)).detach().cpu()
