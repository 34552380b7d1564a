"""A checkpoint in, the same weights as GGUF files for llama.cpp out, tensor by tensor and byte for byte.

Needs the package `gguf`, llama.cpp's own writer. The files have no tokenizer (llama.cpp calls that `no_vocab`): tokens
go in and out as numbers. Vectors and convolutions become float32, as llama.cpp wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixtral_cli.errors import ModelError
from pixtral_cli.model.config import ModelConfig, VisionConfig
from pixtral_cli.model.kernels import Weight
from weights_cache import names, packed
from weights_cache.checkpoint import Checkpoint
from weights_cache.codecs.packed_rows import PackedRows
from weights_cache.configs import GGUF_VISION, IMAGE_MEAN, IMAGE_STD
from weights_cache.encodings import ENCODINGS, Encoding

END_OF_ROW, IMAGE_BREAK = "v.token_embd.img_break", 12
"""What llama.cpp calls the embedding that ends a row of patches, and whose it is in all of Mistral's vocabularies."""


def write(checkpoint: Checkpoint, config: ModelConfig, path: Path) -> None:
    """The text model as a GGUF file of the architecture `llama`, or `mistral3` where queries grow.

    Raises ModelError when an encoding is none of ggml's, ImportError without the package.
    """
    from gguf import GGUFWriter

    text = config.text
    windows = set(text.sliding_windows)
    if windows != {None} and min(window or 0 for window in windows) < text.max_length:
        raise ModelError("Its layers see windows of the text, and llama.cpp's model `llama` has none.")
    writer = GGUFWriter(path, "mistral3" if text.query_scaling else "llama")
    _add_sizes(writer, config)
    writer.add_vocab_size(text.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    shown = [name for name in checkpoint.tensors if not name.startswith(names.VISION)]
    _write_tensors(writer, [_entry(checkpoint, name, text.head_dim) for name in shown])


def _add_sizes(writer: Any, config: ModelConfig) -> None:
    from gguf import RopeScalingType

    text = config.text
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
    if text.yarn:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(text.yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(text.yarn.original_length)
        writer.add_rope_scaling_yarn_beta_fast(text.yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(text.yarn.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(float(text.yarn.attention_factor == 1))  # all that published models have
    if text.query_scaling:
        writer.add_attn_temperature_scale(text.query_scaling.beta)


def write_pictures(checkpoint: Checkpoint, config: ModelConfig, path: Path) -> None:
    """The vision tower and its projector as an mmproj file. Raises as `write`."""
    from gguf import GGUFType, GGUFWriter, VisionProjectorType

    vision, layout = config.vision, config.image_layout
    assert layout is not None, config.architecture
    if not isinstance(vision, VisionConfig):
        raise ModelError("its pictures go through a tower that is not written as GGUF here.")
    writer = GGUFWriter(path, GGUF_VISION)
    writer.add_type(GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(VisionProjectorType.PIXTRAL)
    writer.add_vision_projection_dim(config.text.hidden_size)
    writer.add_vision_image_size(layout.longest_side)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_spatial_merge_size(layout.token_size // vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_layers)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_attention_layernorm_eps(vision.norm_eps)
    writer.add_vision_use_silu(True)
    writer.add_vision_image_mean(IMAGE_MEAN)
    writer.add_vision_image_std(IMAGE_STD)
    shown = [name for name in checkpoint.tensors if name.startswith(names.VISION)]
    end_of_row = Entry(END_OF_ROW, ENCODINGS["float32"], (config.text.hidden_size,), lambda: _row(checkpoint))
    _write_tensors(writer, [*(_entry(checkpoint, name, vision.head_dim) for name in shown), end_of_row])


def write_vocabulary(config: ModelConfig, path: Path) -> None:
    """A GGUF without weights and with a few tokens: all that llama.cpp asks of a text model beside a picture."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    _add_sizes(writer, config)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "[IMG_BREAK]", "[IMG]", "[IMG_END]"]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, 3, 3, 3])  # unknown, control, byte
    _write_tensors(writer, [])


class Entry(NamedTuple):
    """A tensor of a file; `make()` gives its bytes, uint8 [rows, row bytes], when its turn comes."""

    name: str
    kind: Encoding
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _entry(checkpoint: Checkpoint, name: str, head_dim: int) -> Entry:
    """Raises ModelError for an encoding that ggml does not have."""
    info = checkpoint.tensors[name]
    kind = ENCODINGS[info.encoding if len(info.shape) == 2 else "float32"]
    if kind.ggml is None:
        raise ModelError(f"llama.cpp has no {kind.name}.")

    def make() -> Tensor:
        rows = _rows(checkpoint.weight(name))
        return names.neighbours(rows, head_dim) if names.rotary_part(name) else rows

    return Entry(names.to_gguf(name), kind, info.shape, make)


def _rows(weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return (weight if weight.ndim == 2 else weight.float()).contiguous().view(torch.uint8)
    assert isinstance(weight, PackedRows), f"rows of {weight.encoding} are none of ggml's"
    return weight.rows


def _row(checkpoint: Checkpoint) -> Tensor:
    """The embedding of the token that ends a row of patches."""
    table = checkpoint.weight(names.EMBEDDING)
    row = packed.plain(packed.rows_of(table, IMAGE_BREAK, IMAGE_BREAK + 1))[0]
    return row.float().view(torch.uint8)


def _write_tensors(writer: Any, entries: Sequence[Entry]) -> None:
    import numpy
    from gguf import GGMLQuantizationType

    for entry in entries:
        assert entry.kind.ggml is not None, entry.kind
        shape = *entry.shape[:-1], entry.kind.row_bytes(entry.shape[-1])
        dtype, kind = numpy.dtype("uint8"), GGMLQuantizationType(entry.kind.ggml)
        writer.add_tensor_info(entry.name, shape, dtype, prod(shape), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.make().contiguous().numpy())
    writer.close()
