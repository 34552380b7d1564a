"""A checkpoint in, a model with its weights out. Knows no names but ours.

The model is built without memory, then each tensor is assigned: as it lies in the file (memory-mapped) where
device and dtype agree, converted one at a time where they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from pixtral_cli.encodings import Encoding, find
from pixtral_cli.model.config import ModelConfig
from pixtral_cli.model.llava import Llava
from weights_cache.checkpoint import Checkpoint, TensorInfo
from weights_cache.errors import CheckpointCorrupt, TensorShapeMismatch, TensorsMissing, TensorsUnexpected

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOATS = ("F64", "F32", "F16", "BF16")
TIED = "lm_head.weight"
Progress = Callable[[str, int, int | None], None]  # what is being done, bytes done, bytes in all


def default_encoding(tensors: Iterable[TensorInfo]) -> Encoding:
    """bfloat16 where the checkpoint has 16-bit weights, else float32."""
    return find("bfloat16" if any(t.dtype in ("BF16", "F16") for t in tensors) else "float32")


def load(
    checkpoint: Checkpoint,
    config: ModelConfig,
    encoding: Encoding,
    device: torch.device,
    progress: Progress | None = None,
) -> Llava:
    """The model of `config` with the checkpoint's weights in `encoding`, on `device`, ready to run.

    Raises TensorsMissing, TensorsUnexpected or TensorShapeMismatch, before anything large is read.
    """
    with torch.device("meta"):
        model = Llava(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.text.tied_embeddings:
        del shapes[TIED]
    check_tensors(shapes, checkpoint)
    weights: dict[str, Tensor] = {}
    done, total = 0, sum(checkpoint.tensors[name].nbytes for name in shapes)
    for name in shapes:
        weights[name] = checkpoint.tensor(name).to(device, DTYPES[encoding.name])
        done += checkpoint.tensors[name].nbytes
        if progress is not None:
            progress("Loading", done, total)
    if config.text.tied_embeddings:
        weights[TIED] = weights["language_model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def check_tensors(shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
    """Every tensor there, none left over, each of its shape. A tied model's own lm_head is passed over."""
    tensors = checkpoint.tensors
    if missing := [name for name in shapes if name not in tensors]:
        raise TensorsMissing(missing, checkpoint.folder)
    if unexpected := [name for name in tensors if name not in shapes and name != TIED]:
        raise TensorsUnexpected(unexpected, checkpoint.folder)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise TensorShapeMismatch(name, shape, tensors[name].shape)
        if tensors[name].dtype not in FLOATS:
            raise CheckpointCorrupt(tensors[name].file, f"tensor {name} is of {tensors[name].dtype}, not of numbers")
