"""A checkpoint in, a model with its weights out. Knows no names but ours.

The model is built without memory, then each tensor is put in its place: as it lies in the file (memory-mapped) where
device and encoding agree, converted one at a time where they do not, so that peak memory stays near the final size.
On a card the matrices that multiply the same activations are joined as soon as all of them are there; on a CPU they
stay where they are, and are multiplied in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pixtral_cli.model import families, joining, kernels
from pixtral_cli.model.config import ModelConfig
from pixtral_cli.model.kernels import KernelLinear, Weight, nf4
from pixtral_cli.model.kernels.reference import PackedEmbedding
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.native_decoder import NativeDecoder
from pixtral_cli.model.pass_threads import WatchedThreads
from pixtral_cli.model.placement import FLOATS, Placement
from pixtral_cli.model.to_card import ToCard
from weights_cache import codecs
from weights_cache.checkpoint import Checkpoint
from weights_cache.codecs import fp8
from weights_cache.errors import TensorShapeMismatch, TensorsMissing, TensorsUnexpected
from weights_cache.names import HEAD
from weights_cache.packed import PackedRows
from weights_cache.progress import Progress

ENCODING_THREADS, STEPS_A_WEIGHT = WatchedThreads(), 64
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
    fill = _fill_card if device.type == "cuda" else _fill
    for name in fill(model, checkpoint, names, placement, device):
        done += checkpoint.tensors[name].nbytes
        if progress is not None:
            progress("Loading", done, total)
    if HEAD not in names:
        _tie(model)
    joining.multiply_together(model.language_model)
    model.language_model.native = NativeDecoder.of(model.language_model)
    return model.requires_grad_(False).eval()


def empty(config: ModelConfig) -> LanguageModel:
    """The model without memory."""
    with torch.device("meta"):
        return families.build(config)


def check_names(model: LanguageModel, checkpoint: Checkpoint) -> list[str]:
    """The tensors that the model is made of, in its order; raises as `load` when the checkpoint has others.

    A head of its own counts, whatever the config says of tied ones (as in transformers since 5.24).
    """
    tensors, where = checkpoint.tensors, next(iter(checkpoint.weight_paths), checkpoint.folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if model.config.text.tied_embeddings and HEAD not in tensors:
        del shapes[HEAD]
    if missing := [name for name in shapes if name not in tensors]:
        raise TensorsMissing(missing, where)
    if unexpected := [name for name in tensors if name not in shapes and not name.startswith(model.unread)]:
        raise TensorsUnexpected(unexpected, where)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise TensorShapeMismatch(name, shape, tensors[name].shape)
    return list(shapes)


def _fill(
    model: LanguageModel, checkpoint: Checkpoint, names: Sequence[str], placement: Placement, device: torch.device
) -> Iterator[str]:
    """Give each parameter its weight, and tell its name then."""
    for name in names:
        _put(model, name, encoded(checkpoint, name, placement), DTYPES[placement.dtype], device)
        yield name


def _fill_card(
    model: LanguageModel, checkpoint: Checkpoint, names: Sequence[str], placement: Placement, device: torch.device
) -> Iterator[str]:
    """As `_fill`, with joined matrices: beside the weights a card needs memory for those of one layer's block."""
    dtype = DTYPES[placement.dtype]
    with ToCard(device) as to_card:
        for group in joining.groups(names):
            weights = []
            for name in group:
                weights.append(_sent(checkpoint, name, placement, to_card))
                yield name
            if not joining.join(model, group, weights, dtype):
                for name, weight in zip(group, weights, strict=True):
                    _put(model, name, weight, dtype, device)


def _sent(checkpoint: Checkpoint, name: str, placement: Placement, to_card: ToCard) -> Weight:
    """As `encoded`, on a card. Floats travel as they are in the file, and are cast there."""
    target, stored = placement.encodings[name], checkpoint.tensors[name].encoding
    floats = target in DTYPES and stored in FLOATS
    sent = to_card.weight(checkpoint.weight(name) if floats else encoded(checkpoint, name, placement))
    checkpoint.release(name)
    return sent.to(DTYPES[target]) if floats and isinstance(sent, Tensor) else sent


def encoded(checkpoint: Checkpoint, name: str, placement: Placement) -> Weight:
    """One tensor in the encoding that it is to have: the file's own bytes if it has it there."""
    stored, target = checkpoint.tensors[name].encoding, placement.encodings[name]
    if target == stored and target not in DTYPES:
        return checkpoint.weight(name)
    weight = checkpoint.tensor(name)
    with ENCODING_THREADS.chosen(weight.numel() * STEPS_A_WEIGHT):
        converted = _converted(weight, target, placement.double_quantization)
    if converted is not weight:
        checkpoint.release(name)  # so that peak memory stays near the final size
    return converted


def _converted(weight: Tensor, target: str, double_quantization: bool) -> Weight:
    if target in DTYPES:
        return weight.to(DTYPES[target])
    if target == "nf4":
        return nf4.encode(weight, double_quantization)
    if target == "fp8":
        return fp8.encode(weight)
    return PackedRows(target, codecs.get(target).encode(weight))


def _put(model: LanguageModel, name: str, weight: Weight, dtype: torch.dtype, device: torch.device) -> None:
    """Give the parameter `name` its weight."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if isinstance(layer, nn.Linear) and leaf == "weight" and (kernel := kernels.choose(weight, dtype, device)):
        model.set_submodule(path, KernelLinear(kernel(weight, device), layer.bias))
    elif isinstance(weight, Tensor):
        setattr(layer, leaf, nn.Parameter(weight.to(device), requires_grad=False))
    else:
        model.set_submodule(path, PackedEmbedding(weight, dtype, device))


def _tie(model: LanguageModel) -> None:
    """Let the head multiply with the table of embeddings, in the order that rows are looked up in: no copy is made."""
    table = model.language_model.embed_tokens
    if isinstance(table, PackedEmbedding) and table.kernel is not None:
        model.lm_head = KernelLinear(table.kernel)
    else:
        model.set_submodule("lm_head", joining.linear(table.weight, model.dtype))
