"""The names that each form gives its tensors -> ours, and the order of rotary rows. Knows no files.

Sources: mistral-inference's module names for the native form; gguf-py's `TENSOR_NAMES` for GGUF; for Hugging Face,
transformers' `save_pretrained`, which writes the older style for LLaVA and bare names for a text-only model
(run with 5.23); the newer style is its module names since 4.52, written with `save_original_format=False`.
A name that no row matches is kept as it is, so that whoever loads can report it in the file's own words.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["text", "vision"]

EMBEDDING, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"
"""Ours, of the first and the last matrix of the text model, which may be one."""
POSITIONS = "vision_tower.embeddings.position_embedding.weight"
"""Of CLIP's table of a vector for each place, which is added and multiplies nothing."""
VISION = ("vision_tower.", "multi_modal_projector.")
"""What our names of the vision part's tensors begin with."""

HF_PREFIXES: tuple[tuple[str, str], ...] = (
    # older: the language model is a complete causal LM inside the LLaVA module
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.transformer.layers.", "vision_tower.layers."),
    # newer: everything but the head lies in one `model`
    ("model.language_model.", "language_model."),
    ("model.vision_tower.transformer.layers.", "vision_tower.layers."),
    ("model.vision_tower.", "vision_tower."),
    # CLIP's tower, which may be a module inside its own
    ("vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    # text only: MistralForCausalLM
    ("model.", "language_model."),
)
"""Rows of (prefix in the file, prefix of ours); the longest prefix that matches decides."""

DROPPED_SUFFIXES: tuple[str, ...] = (".inv_freq", ".position_ids")
"""Buffers that old versions saved and that are computed anew."""

NATIVE: Mapping[str, str] = {
    "tok_embeddings.weight": "language_model.embed_tokens.weight",
    "norm.weight": "language_model.norm.weight",
    "output.weight": "lm_head.weight",
    "vision_encoder.patch_conv.weight": "vision_tower.patch_conv.weight",
    "vision_encoder.ln_pre.weight": "vision_tower.ln_pre.weight",
    "pre_mm_projector_norm.weight": "multi_modal_projector.norm.weight",
    "patch_merger.merging_layer.weight": "multi_modal_projector.patch_merger.merging_layer.weight",
    "vision_language_adapter.w_in.weight": "multi_modal_projector.linear_1.weight",
    "vision_language_adapter.w_in.bias": "multi_modal_projector.linear_1.bias",
    "vision_language_adapter.w_out.weight": "multi_modal_projector.linear_2.weight",
    "vision_language_adapter.w_out.bias": "multi_modal_projector.linear_2.bias",
}
NATIVE_LAYERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "layers.": (
        "language_model.layers.",
        {
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attention.wq": "self_attn.q_proj",
            "attention.wk": "self_attn.k_proj",
            "attention.wv": "self_attn.v_proj",
            "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj",
        },
    ),
    "vision_encoder.transformer.layers.": (
        "vision_tower.layers.",
        {
            "attention_norm": "attention_norm",
            "ffn_norm": "ffn_norm",
            "attention.wq": "attention.q_proj",
            "attention.wk": "attention.k_proj",
            "attention.wv": "attention.v_proj",
            "attention.wo": "attention.o_proj",
            "feed_forward.w1": "feed_forward.gate_proj",
            "feed_forward.w2": "feed_forward.down_proj",
            "feed_forward.w3": "feed_forward.up_proj",
        },
    ),
}
"""Prefix in the file, up to a layer's number -> (prefix of ours, the layer's parts: theirs -> ours)."""

GGUF: Mapping[str, str | None] = {
    "token_embd.weight": "language_model.embed_tokens.weight",
    "output_norm.weight": "language_model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_freqs.weight": None,  # a factor for each frequency; configs.py refuses any but 1
    "v.patch_embd.weight": "vision_tower.patch_conv.weight",
    "v.pre_ln.weight": "vision_tower.ln_pre.weight",
    "mm.input_norm.weight": "multi_modal_projector.norm.weight",
    "mm.patch_merger.weight": "multi_modal_projector.patch_merger.merging_layer.weight",
    "mm.1.weight": "multi_modal_projector.linear_1.weight",
    "mm.1.bias": "multi_modal_projector.linear_1.bias",
    "mm.2.weight": "multi_modal_projector.linear_2.weight",
    "mm.2.bias": "multi_modal_projector.linear_2.bias",
    "v.token_embd.img_break": None,  # a row of token_embd again, for programs that lack the text model here
}
GGUF_LAYERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "blk.": (
        "language_model.layers.",
        {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
    "v.blk.": (
        "vision_tower.layers.",
        {
            "ln1": "attention_norm",
            "ln2": "ffn_norm",
            "attn_q": "attention.q_proj",
            "attn_k": "attention.k_proj",
            "attn_v": "attention.v_proj",
            "attn_out": "attention.o_proj",
            "ffn_gate": "feed_forward.gate_proj",
            "ffn_up": "feed_forward.up_proj",
            "ffn_down": "feed_forward.down_proj",
        },
    ),
}

BITSANDBYTES_STATE = ".quant_state.bitsandbytes__"
"""In the names of what bitsandbytes saves beside a 4-bit matrix; the type of its codes follows."""
BITSANDBYTES_INT8 = ".SCB"
"""The end of what it saves beside a matrix of 8-bit integers."""

ROTARY = re.compile(r"(language_model|vision_tower)\.layers\.\d+\.(self_attn|attention)\.[qk]_proj\.weight")
PARTS: Mapping[str, Part] = {"language_model": "text", "vision_tower": "vision"}

_LONGEST_FIRST = sorted(HF_PREFIXES, key=lambda row: len(row[0]), reverse=True)


def from_hf(name: str) -> str | None:
    """Our name for the tensor `name` of a Hugging Face file; None for one that is dropped.

    >>> from_hf("language_model.model.layers.3.mlp.up_proj.weight")
    'language_model.layers.3.mlp.up_proj.weight'
    """
    if name.endswith(DROPPED_SUFFIXES):
        return None
    for theirs, ours in _LONGEST_FIRST:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def from_native(name: str) -> str:
    """Our name for the tensor `name` of Mistral's own files.

    >>> from_native("layers.3.feed_forward.w3.weight")
    'language_model.layers.3.mlp.up_proj.weight'
    """
    return NATIVE.get(name) or _in_layer(name, NATIVE_LAYERS) or name


def from_gguf(name: str) -> str | None:
    """Our name for the tensor `name` of a GGUF file, text or vision part; None for one that is dropped.

    >>> from_gguf("blk.3.ffn_up.weight")
    'language_model.layers.3.mlp.up_proj.weight'
    """
    return GGUF[name] if name in GGUF else _in_layer(name, GGUF_LAYERS) or name


def to_hf(ours: str, sees: bool) -> str:
    """What a Hugging Face file of a text model, or one that sees (in the older style), calls the tensor `ours`.

    >>> to_hf("language_model.layers.3.mlp.up_proj.weight", sees=True)
    'language_model.model.layers.3.mlp.up_proj.weight'
    """
    for theirs, prefix in HF_PREFIXES[:3] if sees else HF_PREFIXES[-1:]:
        if ours.startswith(prefix):
            return theirs + ours.removeprefix(prefix)
    return ours


def to_gguf(ours: str) -> str:
    """What GGUF calls the tensor that we call `ours`; KeyError if it has no name for it.

    >>> to_gguf("language_model.layers.3.mlp.up_proj.weight")
    'blk.3.ffn_up.weight'
    """
    if match := re.fullmatch(r"(.*?\.layers\.)(\d+)\.(.+)\.weight", ours):
        for theirs, (prefix, parts) in GGUF_LAYERS.items():
            for their_part, part in parts.items():
                if (prefix, part) == (match[1], match[3]):
                    return f"{theirs}{match[2]}.{their_part}.weight"
    return {name: theirs for theirs, name in GGUF.items() if name}[ours]


def looks_native(names: Iterable[str]) -> bool:
    """Whether a file's tensor names are Mistral's own. (`norm.weight` alone says nothing.)"""
    return any(name != "norm.weight" and from_native(name) != name for name in names)


def looks_bitsandbytes(names: Iterable[str]) -> bool:
    """Whether among tensors of these names there are layers that bitsandbytes encoded."""
    return any(BITSANDBYTES_STATE in name or name.endswith(BITSANDBYTES_INT8) for name in names)


def rotary_part(ours: str) -> Part | None:
    """Of which part of the model `ours` is a query or key projection, whose rows rotary positions rotate."""
    match = ROTARY.fullmatch(ours)
    return PARTS[match[1]] if match else None


def halves(rows: "Tensor", head_dim: int) -> "Tensor":
    """`rows` [heads * D, …] in the order of Hugging Face, from that of the native form and of GGUF; copied.

    Within each head those rotate neighbours, (0, 1), (2, 3) …; we rotate halves, i with i + D/2. So for D = 4 the rows
    0 1 2 3 become 0 2 1 3 (transformers `convert_mistral_weights_to_hf.py`; the inverse is llama.cpp's `permute`).
    Whole rows move: a packed row is as good as any.
    """
    heads = rows.shape[0] // head_dim
    return rows.reshape(heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def neighbours(rows: "Tensor", head_dim: int) -> "Tensor":
    """`rows` [heads * D, …] in the order of the native form and of GGUF, from ours: undoes `halves`."""
    heads = rows.shape[0] // head_dim
    return rows.reshape(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(rows.shape)


def _in_layer(name: str, layers: Mapping[str, tuple[str, Mapping[str, str]]]) -> str | None:
    """Our name for a layer's weight; None when no table has it. Layers have no biases."""
    match = re.fullmatch(r"(.*?\.)(\d+)\.(.+)\.weight", name)
    ours, parts = layers.get(match[1], ("", {})) if match else ("", {})
    return f"{ours}{match[2]}.{parts[match[3]]}.weight" if match and match[3] in parts else None
