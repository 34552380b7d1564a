"""A checkpoint in, the same weights as GGUF files for llama.cpp out, tensor by tensor and byte for byte.

Needs the package `gguf`, llama.cpp's own writer. The files have no tokenizer (llama.cpp calls that `no_vocab`): tokens
go in and out as numbers. Vectors become float32, as llama.cpp wants them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixtral_cli.errors import ModelError
from pixtral_cli.model.config import ModelConfig
from weights_cache import names
from weights_cache.checkpoint import Checkpoint
from weights_cache.codecs.packed_rows import PackedRows
from weights_cache.encodings import ENCODINGS
from weights_cache.formats.reader import TensorInfo


def write(checkpoint: Checkpoint, config: ModelConfig, path: Path) -> None:
    """The text model as a GGUF file of the architecture `llama`.

    Raises ModelError when an encoding is none of ggml's, ImportError without the package.
    """
    from gguf import GGUFWriter

    text = config.text
    windows = set(text.sliding_windows)
    if windows != {None} and min(window or 0 for window in windows) < text.max_length:
        raise ModelError("Its layers see windows of the text, and llama.cpp's model `llama` has none.")
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(text.max_length)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_heads)
    writer.add_head_count_kv(text.num_kv_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_layer_norm_rms_eps(text.norm_eps)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_vocab_size(text.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    shown = {name: info for name, info in checkpoint.tensors.items() if not name.startswith(names.VISION)}
    _write_tensors(writer, checkpoint, shown, text.head_dim)


def _write_tensors(writer: Any, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], head_dim: int) -> None:
    from gguf import GGMLQuantizationType

    for name, info in tensors.items():
        kind = ENCODINGS["float32" if len(info.shape) == 1 else info.encoding]
        if kind.ggml is None:
            raise ModelError(f"llama.cpp has no {kind.name}.")
        shape = (*info.shape[:-1], kind.row_bytes(info.shape[-1]))
        nbytes = torch.Size(shape).numel()
        dtype = GGMLQuantizationType(kind.ggml)
        writer.add_tensor_info(names.to_gguf(name), shape, _uint8(), nbytes, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in tensors:
        writer.write_tensor_data(_bytes(checkpoint, name, head_dim).numpy())
        checkpoint.release(name)
    writer.close()


def _uint8() -> Any:
    import numpy

    return numpy.dtype("uint8")


def _bytes(checkpoint: Checkpoint, name: str, head_dim: int) -> Tensor:
    """A weight's bytes in ggml's order, uint8 [rows, row bytes]."""
    weight = checkpoint.weight(name)
    if isinstance(weight, Tensor):
        rows = (weight.float() if weight.ndim == 1 else weight).contiguous().view(torch.uint8)
    else:
        assert isinstance(weight, PackedRows), f"{name} is {weight.encoding}"
        rows = weight.rows
    return names.neighbours(rows, head_dim).contiguous() if names.rotary_part(name) else rows
