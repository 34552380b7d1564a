"""A checkpoint in, a model with its weights out. Knows no names but ours.

The model is built without memory, then each tensor is put in its place: as it lies in the file (memory-mapped) where
device and encoding agree, converted one at a time where they do not, so that peak memory stays near the final size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixtral_cli.model import families
from pixtral_cli.model.config import ModelConfig
from pixtral_cli.model.kernels import int4, nf4
from pixtral_cli.model.kernels.reference import PackedEmbedding, PackedLinear
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.layers import Embedding
from pixtral_cli.model.pass_threads import PassThreads
from pixtral_cli.model.placement import FLOATS, Placement
from weights_cache import codecs
from weights_cache.checkpoint import Checkpoint
from weights_cache.codecs.int4 import Int4
from weights_cache.codecs.nf4 import NF4
from weights_cache.errors import CheckpointCorrupt, TensorShapeMismatch, TensorsMissing, TensorsUnexpected
from weights_cache.names import HEAD
from weights_cache.progress import Progress

ENCODING_THREADS, STEPS_A_WEIGHT = PassThreads(), 64
"""Encoding is done in many short steps, so that its threads meet often, as those of a decode pass do."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(
    checkpoint: Checkpoint,
    config: ModelConfig,
    placement: Placement,
    device: torch.device,
    progress: Progress | None = None,
) -> LanguageModel:
    """The model of `config` with the checkpoint's weights as `placement` says, on `device`, ready to run.

    Raises TensorsMissing, TensorsUnexpected or TensorShapeMismatch, before anything large is read.
    """
    model = empty(config)
    names = check_names(model, checkpoint)
    done, total = 0, sum(checkpoint.tensors[name].nbytes for name in names)
    for name in names:
        _put(model, name, encoded(checkpoint, name, placement), placement, device)
        if isinstance(model.get_submodule(name.rpartition(".")[0]), int4.Int4Linear):
            checkpoint.release(name)  # in another order now; or, if in its own, read for its scales only
        done += checkpoint.tensors[name].nbytes
        if progress is not None:
            progress("Loading", done, total)
    if HEAD not in names:
        _tie(model)
    return model.requires_grad_(False).eval()


def empty(config: ModelConfig) -> LanguageModel:
    """The model without memory."""
    with torch.device("meta"):
        return families.build(config)


def check_names(model: LanguageModel, checkpoint: Checkpoint) -> list[str]:
    """The tensors that the model is made of, in its order; raises as `load` when the checkpoint has others.

    A head of its own counts, whatever the config says of tied ones (as in transformers since 5.24).
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if model.config.text.tied_embeddings and HEAD not in checkpoint.tensors:
        del shapes[HEAD]
    check_tensors(shapes, checkpoint)
    return list(shapes)


def encoded(checkpoint: Checkpoint, name: str, placement: Placement) -> Tensor | NF4 | Int4:
    """One tensor in its encoding: plain, packed uint8 [rows, bytes of a row], NF4, or Int4 where the file has that.

    The file's own bytes if the encodings agree.
    """
    stored, target = checkpoint.tensors[name].encoding, placement.encodings[name]
    if target == stored and target not in DTYPES:
        return checkpoint.nf4(name) if target == "nf4" else checkpoint.int4(name) or checkpoint.packed(name)
    weight = checkpoint.tensor(name)
    with ENCODING_THREADS.chosen(1, weight.numel() * STEPS_A_WEIGHT):
        converted = _converted(weight, target, placement.double_quantization)
    if converted is not weight:
        checkpoint.release(name)  # so that peak memory stays near the final size
    return converted


def _converted(weight: Tensor, target: str, double: bool) -> Tensor | NF4:
    if target in DTYPES:
        return weight.to(DTYPES[target])
    return nf4.encode(weight, double) if target == "nf4" else codecs.get(target).encode(weight)


def _put(
    model: LanguageModel, name: str, weight: Tensor | NF4 | Int4, placement: Placement, device: torch.device
) -> None:
    """Give the parameter `name` its weight; a packed one turns its layer into a packed layer."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if isinstance(weight, Tensor) and weight.dtype != torch.uint8:
        setattr(layer, leaf, nn.Parameter(weight.to(device), requires_grad=False))
        return
    if isinstance(weight, NF4):
        packed: nn.Module = nf4.NF4Linear(weight.to(device), layer.bias)
    else:
        packed = _packed_layer(layer, weight, placement.encodings[name], DTYPES[placement.dtype], device)
    model.set_submodule(path, packed)


def _packed_layer(
    layer: nn.Module, weight: Tensor | Int4, encoding: str, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """What multiplies or looks up with `weight` in place of `layer`: the kernel's layer where there is one."""
    if isinstance(layer, nn.Linear) and int4.takes(encoding, layer.out_features, dtype, device):
        ordered = weight if isinstance(weight, Int4) else Int4.from_rows(encoding, weight)
        return int4.Int4Linear(ordered, layer.bias)
    codec, rows = codecs.get(encoding), (weight.rows() if isinstance(weight, Int4) else weight).to(device)
    if isinstance(layer, Embedding):
        return PackedEmbedding(codec, rows, dtype)
    return PackedLinear(codec, rows, layer.bias)


def _tie(model: LanguageModel) -> None:
    embedding = model.language_model.embed_tokens
    if isinstance(embedding, PackedEmbedding):
        model.lm_head = PackedLinear(embedding.codec, embedding.packed)
    else:
        model.lm_head.weight = embedding.weight


def check_tensors(shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
    """Every tensor there, none left over, each of its shape."""
    tensors, where = checkpoint.tensors, next(iter(checkpoint.weight_paths), checkpoint.folder)
    if missing := [name for name in shapes if name not in tensors]:
        raise TensorsMissing(missing, where)
    if unexpected := [name for name in tensors if name not in shapes]:
        raise TensorsUnexpected(unexpected, where)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise TensorShapeMismatch(name, shape, tensors[name].shape)
        if tensors[name].encoding not in (*FLOATS, *codecs.NAMES, "nf4"):
            raise CheckpointCorrupt(tensors[name].file, f"tensor {name} is of {tensors[name].dtype}, not of weights")
