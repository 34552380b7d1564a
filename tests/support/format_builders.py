"""One Hugging Face folder in, the same model in Mistral's native form and in GGUF out.

Written for tests, apart from the readers under test: the native form by the names of mistral-inference's modules, GGUF
by gguf-py's own writer and name tables. `interleaved` undoes what transformers' converter did to rotary rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFWriter, TokenType, quants
from safetensors.torch import load_file, save_file
from torch import Tensor

QUANTS = gguf.GGMLQuantizationType
ROTARY = ("q_proj.weight", "k_proj.weight")
ROTARY_SCALES = ("q_proj.weight_scale_inv", "k_proj.weight_scale_inv")
BLOCKS_OF_ROWS = 8  # more are scales of rows: those of blocks of whole heads stay where they are
TO_NATIVE = {
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attention",
    "mlp": "feed_forward",
    "vision_tower": "vision_encoder",
    "multi_modal_projector": "vision_language_adapter",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "linear_1": "w_in",
    "linear_2": "w_out",
    "weight_scale_inv": "qscale_weight",
    "activation_scale": "qscale_act",
    "language_model": None,
    "model": None,
}
"""Each word of a Hugging Face tensor name in the words of mistral-inference; None: no such level there."""
TO_NATIVE_MERGER = {
    "multi_modal_projector.norm": "pre_mm_projector_norm",
    "multi_modal_projector.patch_merger": "patch_merger",
}
"""What stands before the projector has names of its own."""


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, C] from Hugging Face's order to that of the native form and of GGUF.

    Row i of a head's first half and row i of its second become neighbours, 2i and 2i + 1.
    """
    head_dim = weight.shape[0] // heads
    order = [head * head_dim + half * head_dim // 2 + i for head in range(heads) for i in range(head_dim // 2)
             for half in (0, 1)]  # fmt: skip
    return weight[order]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def _heads(name: str, config: Mapping[str, Any]) -> int:
    """Heads of a query or key projection, by its Hugging Face name."""
    if "vision_tower" in name:
        return config["vision_config"]["num_attention_heads"]
    text = config.get("text_config", config)
    return text["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]


def _reordered(name: str, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    if name.endswith(ROTARY_SCALES) and weight.ndim == 2 and len(weight) > BLOCKS_OF_ROWS:  # a scale for each row
        return interleaved(weight, _heads(name, config))
    return interleaved(weight, _heads(name, config)) if name.endswith(ROTARY) else weight


def native(source: Path, folder: Path, shards: int = 1, **changes: Any) -> None:
    """Write `source` as consolidated.safetensors and params.json; `changes` go into params.json (None removes)."""
    settings = config(source)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        _native_name(name): _reordered(name, weight, settings).contiguous() for name, weight in tensors(source).items()
    }
    if shards == 1:
        save_file(weights, folder / "consolidated.safetensors")
    for number in range(shards if shards > 1 else 0):
        part = {name: weights[name] for name in sorted(weights)[number::shards]}
        save_file(part, folder / f"consolidated-{number + 1:05d}-of-{shards:05d}.safetensors")
    params = {**_params(settings), **changes}
    (folder / "params.json").write_text(json.dumps({key: v for key, v in params.items() if v is not None}))


def _native_name(name: str) -> str:
    for theirs, native in TO_NATIVE_MERGER.items():
        name = name.replace(theirs, native)
    words = [TO_NATIVE.get(word, word) for word in name.split(".")]
    return ".".join(word for word in words if word is not None)


def _params(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = config.get("text_config", config), config.get("vision_config")
    params = {
        "dim": text["hidden_size"],
        "n_layers": text["num_hidden_layers"],
        "head_dim": text["head_dim"],
        "hidden_dim": text["intermediate_size"],
        "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"],
        "norm_eps": text["rms_norm_eps"],
        "vocab_size": text["vocab_size"],
        **_rope(text["rope_parameters"]),
        "sliding_window": text.get("sliding_window"),
        "max_position_embeddings": text["max_position_embeddings"],
    }
    if vision:
        keys = "hidden_size num_channels image_size patch_size intermediate_size num_hidden_layers num_attention_heads"
        params["vision_encoder"] = {key: vision[key] for key in keys.split()} | {
            "rope_theta": vision["rope_parameters"]["rope_theta"],
            "image_token_id": config["image_token_index"],
        }
    if "spatial_merge_size" in config:
        params["vision_encoder"] |= {
            "spatial_merge_size": config["spatial_merge_size"],
            "add_pre_mm_projector_layer_norm": True,
            "mm_projector_id": "patch_merge",
            "adapter_bias": config["multimodal_projector_bias"],
            "image_break_token_id": 12,
            "image_end_token_id": 13,
        }
    return params


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM's `configs/mistral.py` reads."""
    found = {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] == "yarn":
        length = rope["original_max_position_embeddings"]
        found["yarn"] = {
            "original_max_position_embeddings": length,
            "factor": rope["factor"],
            "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"],
            "apply_scale": not rope["mscale_all_dim"],
        }
        if beta := rope["llama_4_scaling_beta"]:
            found["llama_4_scaling"] = {"original_max_position_embeddings": length, "beta": beta}
    return found


Choose = Callable[[str], QUANTS]


def gguf_text(
    source: Path, path: Path, choose: Choose = lambda name: QUANTS.F32, edit=lambda writer: None, without: str = ""
) -> None:
    """Write the text part of `source` as a GGUF of architecture `llama`, or of `mistral3` where queries grow;
    `choose(name)` gives a matrix's type."""
    settings = config(source)
    text = settings.get("text_config", settings)
    rope = text["rope_parameters"]
    writer = GGUFWriter(path, "mistral3" if rope.get("llama_4_scaling_beta") else "llama")
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_rope_dimension_count(text["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        if beta := rope["llama_4_scaling_beta"]:
            writer.add_attn_temperature_scale(beta)
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])
    if (source / "tokenizer.json").exists():
        add_tokenizer(writer, source)
    edit(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, text["num_hidden_layers"])
    for name, weight in tensors(source).items():
        if "vision" not in name and "projector" not in name:
            theirs = names.get_name(name.replace("language_model.", ""), (".weight",))
            if theirs != without:
                _add(writer, theirs, _reordered(name, weight, settings), choose)
    finish(writer)


def gguf_pictures(source: Path, path: Path, choose: Choose = lambda name: QUANTS.F32, edit=lambda writer: None) -> None:
    """Write the vision tower and projector of `source` as an mmproj GGUF."""
    settings = config(source)
    vision = settings["vision_config"]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ])
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.PIXTRAL)
    writer.add_vision_projection_dim(settings["text_config"]["hidden_size"])
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["num_hidden_layers"])
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(1e-5)
    writer.add_vision_use_silu(True)
    if "spatial_merge_size" in settings:
        writer.add_vision_spatial_merge_size(settings["spatial_merge_size"])
    writer.add_vision_image_mean([0.48145466, 0.4578275, 0.40821073])
    writer.add_vision_image_std([0.26862954, 0.26130258, 0.27577711])
    edit(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision["num_hidden_layers"])
    for name, weight in tensors(source).items():
        if "vision" in name or "projector" in name:
            theirs = names.get_name(name.removeprefix("model."), (".weight", ".bias"))
            _add(writer, theirs, _reordered(name, weight, settings), choose)
    image_break = next(weight for name, weight in tensors(source).items() if "embed_tokens" in name)[12]
    _add(writer, gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_TOK_EMBD_IMG_BREAK], image_break, choose)
    finish(writer)


def _add(writer: GGUFWriter, name: str, weight: Tensor, choose: Choose) -> None:
    kind = choose(name) if weight.ndim > 1 else QUANTS.F32
    writer.add_tensor(name, packed(weight, kind), raw_dtype=kind)


def packed(weight: Tensor, kind: QUANTS) -> np.ndarray:
    """By gguf-py, which cannot write the k-quants: those by our own encoders, whose every output is a valid block."""
    if kind in (QUANTS.Q4_K, QUANTS.Q6_K):
        from weights_cache import codecs

        return codecs.get(kind.name.lower()).encode(weight.float()).numpy()
    return quants.quantize(np.ascontiguousarray(weight.float().numpy()), kind)


def add_tensors(writer: GGUFWriter, more: Mapping[str, Tensor]) -> None:
    for name, tensor in more.items():
        writer.add_tensor(name, tensor.numpy())


def finish(writer: GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: GGUFWriter, folder: Path, pre: str = "gpt-2") -> None:
    """Write the byte-level tokenizer.json of `folder`, as llama.cpp's converter does."""
    data = json.loads((folder / "tokenizer.json").read_text())
    entries = {id: text for text, id in data["model"]["vocab"].items()}
    added = {token["id"]: token for token in data["added_tokens"]}
    texts = [added[id]["content"] if id in added else entries[id] for id in range(len({*entries, *added}))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types([_token_type(added.get(id)) for id in range(len(texts))])
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(texts.index("<s>"))
    writer.add_eos_token_id(texts.index("</s>"))
    writer.add_add_bos_token(True)
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())


def _token_type(added: Mapping[str, Any] | None) -> TokenType:
    if added is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED


def write_tekken(source: Path, folder: Path) -> None:
    """The tokenizer.json of `source` as a tekken.json of the same ids.

    Its control tokens must come first, then the 256 bytes, then an entry for each merge, in order.
    """
    from base64 import b64encode

    from transformers.convert_slow_tokenizer import bytes_to_unicode

    data = json.loads((source / "tokenizer.json").read_text())
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    special = len(data["added_tokens"])
    entries = sorted((id, text) for text, id in data["model"]["vocab"].items() if id >= special)
    vocabulary = [b64encode(bytes(letters[c] for c in text)).decode() for _, text in entries]
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tekken = {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": len(entries),
            "default_vocab_size": len(entries) + special,
            "default_num_special_tokens": special,
            "version": "v3",
        },
        "vocab": [{"rank": rank, "token_bytes": text, "token_str": None} for rank, text in enumerate(vocabulary)],
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))


def quantized(weight: Tensor, kind: QUANTS) -> Tensor:
    """What remains of `weight` when it has been packed, as gguf-py unpacks it."""
    return torch.from_numpy(quants.dequantize(packed(weight, kind), kind))
