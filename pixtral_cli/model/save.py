"""A placement and where its weights come from in, what a serialized model is written from out. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from pixtral_cli.model.kernels import Weight
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.load import DTYPES
from pixtral_cli.model.placement import Placement
from weights_cache import packed
from weights_cache.checkpoint import Checkpoint
from weights_cache.codecs import fp8
from weights_cache.codecs.nf4 import BLOCK, NF4
from weights_cache.formats import serialized_writer


def weights(
    checkpoint: Checkpoint, names: Iterable[str], placement: Placement, weight_of: Callable[[str], Weight]
) -> list[serialized_writer.Weight]:
    """What to write of each weight; `weight_of(name)` gives it in its encoding when its turn comes."""
    return [_weight(checkpoint, name, placement, partial(weight_of, name)) for name in names]


def _weight(
    checkpoint: Checkpoint, name: str, placement: Placement, make: Callable[[], Weight]
) -> serialized_writer.Weight:
    encoding, shape = placement.encodings[name], checkpoint.tensors[name].shape
    if encoding in DTYPES:
        return serialized_writer.Weight(name, encoding, shape, {"": (DTYPES[encoding], shape)}, make)
    rows, columns = shape
    stored = checkpoint.tensors[name]
    block, nested, scales = BLOCK, placement.double_quantization, 1
    if stored.encoding == encoding == "nf4":  # it stays as it is encoded
        weight = checkpoint.weight(name)
        assert isinstance(weight, NF4), f"{name} is {type(weight).__name__}"
        block, nested = weight.block, weight.nested
    if stored.encoding == encoding == "fp8":
        scales = fp8.scales_in(stored.nbytes, rows, columns)
    parts = packed.parts(encoding, (rows, columns), block=block, nested=nested, scales=scales)
    return serialized_writer.Weight(name, encoding, shape, parts, make)


def loaded(model: LanguageModel, name: str) -> Weight:
    """The weight that a loaded model has under `name`, on the CPU."""
    path, _, leaf = name.rpartition(".")
    weight: Weight = getattr(model.get_submodule(path), leaf)
    return (weight.detach() if isinstance(weight, Tensor) else weight).to(torch.device("cpu"))
