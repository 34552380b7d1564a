"""The sizes that a model has in another form -> a config as Hugging Face writes it. Knows tensors by name and shape.

The forms are Mistral's own params.json (mistral-inference's `args.py`, `transformer.py` and `rope.py`) and a GGUF's
metadata (gguf-py's `constants.py`, and llama.cpp's `conversion/` for what writes it). Nothing in them is believed
unchecked, and what would change what a model computes and is not known here is refused by its name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import other_models
from .errors import CheckpointCorrupt, FilesMismatch, ModelUnsupported, UnknownArchitecture
from .formats.gguf import GgufFile
from .json_fields import CheckpointFields, is_number

IMAGE_TOKEN_ID = 10
"""Of `[IMG]` in all of Mistral's vocabularies."""
VISION_ROPE_THETA = 10_000.0

NATIVE_ROPE_THETA = 1_000_000.0  # `self.args.rope_theta or 1000000.0`
NATIVE_CONTEXT = 128_000  # positions that the reference prepares; older files do not say it
NATIVE_UNKNOWN = ("lora", "use_biases")
"""Fields whose presence, unless they are empty or false, changes what the model computes."""
NATIVE_MERGER = "patch_merge"
"""The one `mm_projector_id`, of models that norm patches and merge them before the projector."""

GGUF_ARCHITECTURES = ("llama", "mistral3")
"""Of text models; what runs as either has the same tensors."""
GGUF_UNKNOWN = (
    "attention.sliding_window_pattern",
    "attention.layer_norm_epsilon",
    "logit_scale",
)
"""As NATIVE_UNKNOWN, after the architecture's name."""
GGUF_UNKNOWN_YARN = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor")
"""Numbers that, unless they are 1, change how positions are scaled."""
GGUF_ROPE_THETA = 10_000.0
GGUF_VISION, GGUF_PROJECTOR, GGUF_MERGER = "clip", "pixtral", "mm.patch_merger.weight"
"""The architecture of an mmproj file, the one kind of projector that is read, and the tensor of those that merge."""
PLAIN: Mapping[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "vision_feature_select_strategy": "full",
}
MERGING: Mapping[str, Any] = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
"""What Hugging Face calls models that see, one with a token a patch, and one that merges patches."""
TOKENIZER = "tokenizer."
TOKENS = "tokenizer.ggml.tokens"
IMAGE_TOKEN = "[IMG]"
VISION_EPS = 1e-5
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the head may be the embedding: either section may say it, as in transformers' `LlavaConfig`. What
    `Mistral3Config` says where neither does is true."""
    text = config.get("text_config")
    sections = (config, text if isinstance(text, Mapping) else {})
    said = [section["tie_word_embeddings"] for section in sections if "tie_word_embeddings" in section]
    return any(each is True for each in said) if said else config.get("model_type") == MERGING["model_type"]


def head_dims(config: Mapping[str, Any]) -> dict[str, int]:
    """Rows of one head in the query and key projections of each part, for a config made here."""
    dims = {"text": config.get("text_config", config)["head_dim"]}
    if vision := config.get("vision_config"):
        dims["vision"] = vision["hidden_size"] // vision["num_attention_heads"]
    return dims


def _text_model(text: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a text model, from MistralConfig's or Ministral3Config's fields."""
    architecture = "Ministral3ForCausalLM" if text.get("model_type") == "ministral3" else "MistralForCausalLM"
    return {"architectures": [architecture], "model_type": "mistral", **text}


def _vision_model(
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    image_token_id: int,
    projector_bias: bool,
    merge: int | None = None,
) -> dict[str, Any]:
    """The config of a Pixtral, from MistralConfig's and PixtralVisionConfig's fields; or of a Mistral 3, which norms
    patches and merges `merge` of them along each side."""
    shared = {key: text[key] for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings") if key in text}
    return {
        **(PLAIN if merge is None else {**MERGING, "spatial_merge_size": merge}),
        "image_token_index": image_token_id,
        "multimodal_projector_bias": projector_bias,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "text_config": {"model_type": "mistral", **text},
        "vision_config": {"model_type": "pixtral", "hidden_act": "silu", **vision},
        **shared,
    }


def _rope(theta: float, yarn: Mapping[str, Any], beta: float, length: int) -> dict[str, Any]:
    """MistralConfig's field for plain rotary positions; Ministral3Config's for those that YaRN scales, or with queries
    that grow by `beta` for each multiple of `length`."""
    if not yarn and not beta:
        return {"rope_theta": theta}
    scaling = {"original_max_position_embeddings": length, "llama_4_scaling_beta": beta}
    kind = "yarn" if yarn else "default"
    return {
        "model_type": "ministral3",
        "rope_parameters": {"rope_type": kind, "rope_theta": theta, **yarn, **scaling},
    }


def from_native(path: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """The config that `params` describe, which the params.json at `path` holds.

    Raises CheckpointCorrupt (a field is missing or of the wrong kind), ModelUnsupported.
    """
    other_models.refuse_native(path, params)
    _refuse(path, params, NATIVE_UNKNOWN)
    if params.get("model_type", "transformer") != "transformer":
        raise ModelUnsupported(path, f"model_type {str(params['model_type'])[:60]!r}")
    text = _native_text(CheckpointFields(params, path))
    vision = params.get("vision_encoder")
    if vision is None:
        return _text_model(text)
    if not isinstance(vision, dict):
        raise CheckpointCorrupt(path, "its 'vision_encoder' is not an object")
    return _with_native_vision(path, text, vision)


def _native_text(params: CheckpointFields) -> dict[str, Any]:
    heads = params.size("n_heads")
    hidden = params.size("dim")
    tied = {"tie_word_embeddings": params.flag("tied_embeddings")} if "tied_embeddings" in params else {}
    return tied | {
        "vocab_size": params.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": params.size("hidden_dim"),
        "num_hidden_layers": params.size("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": params.size("n_kv_heads", heads),
        "head_dim": params.size("head_dim", hidden // heads),
        "rms_norm_eps": params.number("norm_eps"),
        "max_position_embeddings": params.size("max_seq_len", params.size("max_position_embeddings", NATIVE_CONTEXT)),
        "sliding_window": _native_window(params),
        **_native_rope(params),
    }


def _native_rope(params: CheckpointFields) -> dict[str, Any]:
    """`alpha` and `beta` are how often the frequencies turn between which YaRN passes over; `apply_scale` false leaves
    attention as it is (the names are vLLM's, `transformers_utils/configs/mistral.py`)."""
    theta = params.number("rope_theta", NATIVE_ROPE_THETA)
    yarn, queries = (_native_section(params, key) for key in ("yarn", "llama_4_scaling"))
    scaled: dict[str, Any] = {}
    if yarn:
        scaled = {
            "factor": yarn.number("factor"),
            "beta_fast": yarn.number("beta"),
            "beta_slow": yarn.number("alpha"),
            "mscale": 1.0,
            "mscale_all_dim": 0.0 if yarn.flag("apply_scale", True) else 1.0,
        }
    lengths = {section.size("original_max_position_embeddings") for section in (yarn, queries) if section}
    if len(lengths) > 1:
        raise ModelUnsupported(params.path, "queries that are scaled from another length than its positions")
    beta = queries.checked("beta", None, is_number, "a number") if queries else 0.0
    return _rope(theta, scaled, beta, *lengths or [NATIVE_CONTEXT])


def _native_section(params: CheckpointFields, key: str) -> CheckpointFields | None:
    """The object that `key` has; None for none, an empty one or false."""
    return CheckpointFields(params.object(key), params.path, f"{key}.") if params.get(key) else None


def _native_window(params: CheckpointFields) -> int | list[int | None] | None:
    """One window for all layers, or a list of them, null for none, that the layers repeat."""
    key = "sliding_window" if "sliding_window" in params else "_sliding_window"
    value = params.get(key)
    if isinstance(value, str) and len(value) < 11 and value.isascii() and value.isdecimal():  # some files write so
        value = int(value)
    if not isinstance(value, list):
        return CheckpointFields({key: value}, params.path).size(key) if value is not None else None
    if not value or any(window is not None and (type(window) is not int or window < 1) for window in value):
        raise CheckpointCorrupt(params.path, f"its {key!r} is {str(value)[:60]}, not a list of positive numbers")
    return value


def _with_native_vision(path: Path, text: Mapping[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    fields = CheckpointFields(params, path)
    merge = _native_merge(fields)
    vision = {
        "hidden_size": fields.size("hidden_size"),
        "intermediate_size": fields.size("intermediate_size"),
        "num_hidden_layers": fields.size("num_hidden_layers"),
        "num_attention_heads": fields.size("num_attention_heads"),
        "num_channels": fields.size("num_channels", 3),
        "image_size": fields.size("image_size" if "image_size" in fields else "max_image_size"),
        "patch_size": fields.size("patch_size"),
        "rope_theta": fields.number("rope_theta", VISION_ROPE_THETA),
    }
    asks_tokenizer = params.get("image_token_id") == -1
    image_token = IMAGE_TOKEN_ID if asks_tokenizer else fields.size("image_token_id", IMAGE_TOKEN_ID)
    return _vision_model(text, vision, image_token, fields.flag("adapter_bias", merge is None), merge)


def _native_merge(vision: CheckpointFields) -> int | None:
    """Patches that are merged along each side, after a norm; None where none are. One comes with the other."""
    kind, norms = vision.get("mm_projector_id") or None, vision.flag("add_pre_mm_projector_layer_norm", False)
    merge = vision.size("spatial_merge_size", 1)
    if kind not in (None, NATIVE_MERGER):
        raise ModelUnsupported(vision.path, f"mm_projector_id = {str(kind)[:60]}")
    if norms != (kind is not None):
        raise ModelUnsupported(vision.path, f"mm_projector_id {kind} with add_pre_mm_projector_layer_norm = {norms}")
    if kind is None and merge != 1:
        raise ModelUnsupported(vision.path, f"spatial_merge_size {merge} without mm_projector_id = {NATIVE_MERGER}")
    return None if kind is None else merge


def _refuse(path: Path, params: Mapping[str, Any], features: tuple[str, ...], prefix: str = "") -> None:
    for feature in features:
        if value := params.get(prefix + feature):
            raise ModelUnsupported(path, f"{prefix}{feature} = {str(value)[:60]}")


def from_gguf(text: GgufFile, vision: GgufFile | None = None) -> dict[str, Any]:
    """The config of the model in `text`, which sees with the mmproj file `vision`.

    Raises UnknownArchitecture, ModelUnsupported, CheckpointCorrupt, FilesMismatch.
    """
    sizes = _gguf_text(text, _gguf_fields(text)) | _gguf_ends(text)
    if vision is None:
        return _text_model(sizes)
    seen = _gguf_vision(vision)
    projected = _under(vision, "clip.vision.").size("projection_dim", sizes["hidden_size"])
    if projected != sizes["hidden_size"]:
        reason = f"the features of the first have {projected} numbers, and the second takes {sizes['hidden_size']}"
        raise FilesMismatch(vision.path, reason, text.path)
    image_token_id = _gguf_image_token_id(text)
    if image_token_id is None:
        raise ModelUnsupported(text.path, f"no token for pictures ({IMAGE_TOKEN})")
    return _vision_model(sizes, seen, image_token_id, "mm.1.bias" in vision.tensors, _gguf_merge(vision))


def is_vision_gguf(file: GgufFile) -> bool:
    """Whether this is an mmproj file: the vision tower and projector of a model."""
    return file.metadata.get("general.architecture") == GGUF_VISION


def belong_together(text: GgufFile, vision: GgufFile) -> bool:
    """Whether `vision`, found beside `text`, is an mmproj file that can be its own: of two models of one width in a
    folder, only the one with a token for images sees."""
    width = text.metadata.get(f"{text.metadata.get('general.architecture')}.embedding_length")
    return (
        is_vision_gguf(vision)
        and _gguf_image_token_id(text) is not None
        and _gguf_projector(vision) == GGUF_PROJECTOR
        and vision.metadata.get("clip.vision.projection_dim") in (None, width)
    )


def gguf_head_dims(file: GgufFile) -> dict[str, int]:
    """Rows of one head in the query and key projections that `file` holds; they lie in interleaved order."""
    if is_vision_gguf(file):
        vision = _gguf_vision(file)
        return {"vision": vision["hidden_size"] // vision["num_attention_heads"]}
    return {"text": _gguf_head_dim(_gguf_fields(file))}


def gguf_tokenizer(file: GgufFile) -> dict[str, Any] | None:
    """What the file says of its tokenizer, by keys without `tokenizer.` and `ggml.`; None if it has none.

    For example `model`, `pre`, `tokens`, `token_type`, `merges`, `bos_token_id`, `chat_template`.
    """
    names = [key for key in file.metadata if key.startswith(TOKENIZER)]
    found = {key.removeprefix(TOKENIZER).removeprefix("ggml."): file.metadata[key] for key in names}
    return found if "tokens" in found else None


def _gguf_fields(file: GgufFile) -> CheckpointFields:
    """What a text model's file says under the name of its architecture."""
    architecture = str(file.metadata.get("general.architecture", "none"))[:60]
    other_models.refuse_gguf(file.path, architecture, file.metadata)
    if architecture not in GGUF_ARCHITECTURES:
        raise UnknownArchitecture(architecture, GGUF_ARCHITECTURES)
    return _under(file, f"{architecture}.")


def _under(file: GgufFile, prefix: str) -> CheckpointFields:
    """What the file says under keys that begin with `prefix`, by the rest of the key."""
    under = {key.removeprefix(prefix): file.metadata[key] for key in file.metadata if key.startswith(prefix)}
    return CheckpointFields(under, file.path, prefix)


def _gguf_text(file: GgufFile, fields: CheckpointFields) -> dict[str, Any]:
    _refuse(file.path, file.metadata, GGUF_UNKNOWN, fields.prefix)
    head_dim = _gguf_head_dim(fields)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.size(key, head_dim) != head_dim:
            raise ModelUnsupported(file.path, f"{fields.prefix}{key} = {fields.get(key)} for heads of {head_dim}")
    return {
        "vocab_size": fields.size("vocab_size", _gguf_vocabulary(file)),
        "hidden_size": fields.size("embedding_length"),
        "intermediate_size": fields.size("feed_forward_length"),
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": fields.size("attention.head_count"),
        "num_key_value_heads": fields.size("attention.head_count_kv", fields.size("attention.head_count")),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.size("context_length"),
        "sliding_window": fields.size("attention.sliding_window") if "attention.sliding_window" in fields else None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_gguf_rope(file, fields),
    }


def _gguf_head_dim(fields: CheckpointFields) -> int:
    hidden, heads = fields.size("embedding_length"), fields.size("attention.head_count")
    return fields.size("attention.key_length", hidden // heads)


def _gguf_vocabulary(file: GgufFile) -> int:
    """Rows of the embedding; the file need not say their number."""
    embedding = file.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding else len(_gguf_tokens(file) or ())


def _gguf_rope(file: GgufFile, fields: CheckpointFields) -> dict[str, Any]:
    """Rotary positions that are plain, or scaled by YaRN; and by how much queries grow.

    Other rules are refused, and a table of factors, which old files have with nothing but ones.
    """
    kind = fields.text("rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if kind not in ("none", "yarn") and (kind, factor) != ("linear", 1.0):
        raise ModelUnsupported(file.path, f"rotary positions that are scaled ({kind[:60]})")
    if kind != "yarn" and factor != 1.0:
        raise ModelUnsupported(file.path, f"rotary positions that are scaled by {factor}")
    _refuse_table(file)
    theta = fields.number("rope.freq_base", GGUF_ROPE_THETA)
    beta = fields.checked("attention.temperature_scale", 0.0, is_number, "a number")
    length = fields.size("rope.scaling.original_context_length", fields.size("context_length"))
    return _rope(theta, _gguf_yarn(fields, factor) if kind == "yarn" else {}, beta, length)


def _gguf_yarn(fields: CheckpointFields, factor: float) -> dict[str, Any]:
    """As llama.cpp reads it (`llama-context.cpp`): the logarithm's multiplier undoes what YaRN does to attention."""
    for key in GGUF_UNKNOWN_YARN:
        if fields.number(key, 1.0) != 1.0:
            raise ModelUnsupported(fields.path, f"{fields.prefix}{key} = {fields.get(key)}")
    return {
        "factor": factor,
        "beta_fast": fields.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.number("rope.scaling.yarn_beta_slow", 1.0),
        "mscale": 1.0,
        "mscale_all_dim": fields.checked("rope.scaling.yarn_log_multiplier", 0.0, is_number, "a number"),
    }


def _refuse_table(file: GgufFile) -> None:
    """Refuse a factor for each frequency, unless all are 1."""
    if "rope_freqs.weight" in file.tensors:
        from .packed import plain

        if not plain(file.weight("rope_freqs.weight")).eq(1).all():
            raise ModelUnsupported(file.path, "rotary positions that are scaled by a table (rope_freqs)")


def _gguf_ends(file: GgufFile) -> dict[str, Any]:
    """The ids that begin and end a text; where an answer's end has one of its own, both."""
    ids = {key: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot")}
    ends = [id for id in (ids["eos"], ids["eot"]) if type(id) is int]
    found = {"bos_token_id": ids["bos"]} if type(ids["bos"]) is int else {}
    return found | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def _gguf_image_token_id(file: GgufFile) -> int | None:
    """The id of the token for images; None when there is none among its tokens."""
    tokens = _gguf_tokens(file)
    if tokens is None:
        return IMAGE_TOKEN_ID
    return tokens.index(IMAGE_TOKEN) if IMAGE_TOKEN in tokens else None


def _gguf_tokens(file: GgufFile) -> list[Any] | None:
    """The texts of its tokens; None when it does not say them. Raises CheckpointCorrupt."""
    tokens = file.metadata.get(TOKENS)
    if tokens is not None and not isinstance(tokens, list):
        raise CheckpointCorrupt(file.path, f"its {TOKENS!r} is {str(tokens)[:60]!r} and not a list")
    return tokens


def _gguf_vision(file: GgufFile) -> dict[str, Any]:
    kind = _gguf_projector(file)
    if kind != GGUF_PROJECTOR:
        raise ModelUnsupported(file.path, f"a picture part of the kind {str(kind)[:60]!r} (known: {GGUF_PROJECTOR!r})")
    fields = _under(file, "clip.vision.")
    eps = fields.number("attention.layer_norm_epsilon", VISION_EPS)
    if abs(eps - VISION_EPS) > 1e-9:
        raise ModelUnsupported(file.path, f"a vision tower whose norms add {eps}")
    _check_colours(fields, "image_mean", IMAGE_MEAN)
    _check_colours(fields, "image_std", IMAGE_STD)
    patches = file.tensors.get("v.patch_embd.weight")
    return {
        "hidden_size": fields.size("embedding_length"),
        "intermediate_size": fields.size("feed_forward_length"),
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": fields.size("attention.head_count"),
        "num_channels": patches.shape[1] if patches and len(patches.shape) == 4 else 3,
        "image_size": fields.size("image_size"),
        "patch_size": fields.size("patch_size"),
        "rope_theta": _under(file, "clip.rope.").number("freq_base", VISION_ROPE_THETA),
    }


def _gguf_merge(file: GgufFile) -> int | None:
    """As `_native_merge`: a file that merges patches has a matrix for it."""
    merge = _under(file, "clip.vision.").size("spatial_merge_size", 1)
    if GGUF_MERGER in file.tensors:
        return merge
    if merge != 1:
        raise ModelUnsupported(file.path, f"spatial_merge_size {merge} without a tensor {GGUF_MERGER}")
    return None


def _gguf_projector(file: GgufFile) -> Any:
    return file.metadata.get("clip.projector_type", file.metadata.get("clip.vision.projector_type"))


def _check_colours(fields: CheckpointFields, key: str, expected: tuple[float, ...]) -> None:
    """Images are normalised as for Pixtral; a tower that wants others would see wrong colours."""
    found = fields.get(key)
    if found is None:
        return
    numbers = isinstance(found, list) and all(type(value) is float for value in found)
    if not numbers or len(found) != 3 or any(abs(a - b) > 1e-4 for a, b in zip(found, expected, strict=True)):
        raise ModelUnsupported(fields.path, f"{fields.prefix}{key} = {str(found)[:60]}")
