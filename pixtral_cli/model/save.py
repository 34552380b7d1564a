"""A placement and where its tensors come from in, what a serialized model is written from out. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

from torch import Tensor

from pixtral_cli.model.linear import PackedEmbedding, PackedLinear
from pixtral_cli.model.llava import Llava
from pixtral_cli.model.load import DTYPES
from pixtral_cli.model.placement import Placement
from weights_cache import codecs
from weights_cache.checkpoint import Checkpoint
from weights_cache.serialized import Weight

WORDS = {"float32": "F32", "bfloat16": "BF16"}


def weights(
    checkpoint: Checkpoint, names: Iterable[str], placement: Placement, tensor_of: Callable[[str], Tensor]
) -> list[Weight]:
    """What to write for each tensor; `tensor_of(name)` gives its stored form when its turn comes."""
    return [_weight(checkpoint, name, placement.encodings[name], tensor_of) for name in names]


def _weight(checkpoint: Checkpoint, name: str, encoding: str, tensor_of: Callable[[str], Tensor]) -> Weight:
    shape = checkpoint.tensors[name].shape
    if encoding in DTYPES:
        stored, dtype, width = shape, WORDS[encoding], DTYPES[encoding].itemsize
    else:
        stored, dtype, width = (shape[0], codecs.get(encoding).row_bytes(shape[1])), "U8", 1
    return Weight(name, encoding, shape, dtype, stored, prod(stored) * width, lambda: tensor_of(name))


def loaded(model: Llava, name: str) -> Tensor:
    """The stored form of a tensor of a loaded model, on the CPU."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    packed = isinstance(layer, PackedLinear | PackedEmbedding) and leaf == "weight"
    return (layer.packed if packed else getattr(layer, leaf)).detach().cpu()
