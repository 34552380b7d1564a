"""A GGUF's metadata in, the config as Hugging Face writes it and the tokenizer as the file has it out.

Sources: gguf-py `constants.py` (keys) and llama.cpp's `conversion/` (what writes them, and in which order rows lie).
Knows tensors by name and shape; only `rope_freqs` is read, to see that it changes nothing.
"""

from collections.abc import Mapping
from typing import Any

from . import hf_config
from .errors import CheckpointCorrupt, FilesMismatch, ModelUnsupported, UnknownArchitecture
from .gguf_reader import GgufFile
from .json_fields import CheckpointFields

ARCHITECTURES = ("llama", "mistral3")
"""Of text models; what runs as either has the same tensors, and mistral3's additions are refused by name."""
PICTURES = "clip"
PROJECTOR = "pixtral"
TOKENIZER = "tokenizer."
TOKENS = "tokenizer.ggml.tokens"
IMAGE_TOKEN = "[IMG]"

ROPE_THETA = 10_000.0
VISION_EPS = 1e-5
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

UNKNOWN_FEATURES = (
    "expert_count",
    "attention.temperature_scale",
    "attention.sliding_window_pattern",
    "attention.layer_norm_epsilon",
    "logit_scale",
)
"""Keys that change what a model computes, unless they are 0."""


def is_picture_part(file: GgufFile) -> bool:
    """Whether this is an mmproj file: the vision tower and projector of a model."""
    return file.metadata.get("general.architecture") == PICTURES


def read_config(text: GgufFile, pictures: GgufFile | None = None) -> dict[str, Any]:
    """The config of the model in `text`, which sees with `pictures`.

    Raises UnknownArchitecture, ModelUnsupported, CheckpointCorrupt.
    """
    fields = _text_fields(text)
    sizes = _text(text, fields) | _ends(text)
    if pictures is None:
        return hf_config.text_model(sizes)
    vision = _vision(pictures)
    projected = CheckpointFields(pictures.metadata, pictures.path).size(
        "clip.vision.projection_dim", sizes["hidden_size"]
    )
    if projected != sizes["hidden_size"]:
        reason = f"the features of the first have {projected} numbers, and the second takes {sizes['hidden_size']}"
        raise FilesMismatch(pictures.path, reason, text.path)
    image_token_id = _image_token_id(text)
    if image_token_id is None:
        raise ModelUnsupported(text.path, f"no token for pictures ({IMAGE_TOKEN})")
    return hf_config.vision_model(sizes, vision, image_token_id, "mm.1.bias" in pictures.tensors)


def fits(text: GgufFile, pictures: GgufFile) -> bool:
    """Whether `pictures`, found beside `text`, is a picture part that can be its own: of two models of one width in
    a folder, only the one with a token for pictures sees."""
    metadata = pictures.metadata
    width = text.metadata.get(f"{text.metadata.get('general.architecture')}.embedding_length")
    return (
        is_picture_part(pictures)
        and _image_token_id(text) is not None
        and _projector(metadata) == PROJECTOR
        and metadata.get("clip.vision.projection_dim") in (None, width)
    )


def head_dims(file: GgufFile) -> dict[str, int]:
    """Rows of one head in the query and key projections that `file` holds; they lie in interleaved order."""
    if is_picture_part(file):
        vision = _vision(file)
        return {"vision": vision["hidden_size"] // vision["num_attention_heads"]}
    return {"text": _head_dim(_text_fields(file))}


def tokenizer(file: GgufFile) -> dict[str, Any] | None:
    """What the file says of its tokenizer, by keys without `tokenizer.` and `ggml.`; None if it has none.

    For example `model`, `pre`, `tokens`, `token_type`, `merges`, `bos_token_id`, `chat_template`.
    """
    metadata = file.metadata
    names = [key for key in metadata if key.startswith(TOKENIZER)]
    found = {key.removeprefix(TOKENIZER).removeprefix("ggml."): metadata[key] for key in names}
    return found if "tokens" in found else None


def _text_fields(file: GgufFile) -> CheckpointFields:
    architecture = str(file.metadata.get("general.architecture", "none"))[:60]
    if architecture not in ARCHITECTURES:
        raise UnknownArchitecture(architecture, ARCHITECTURES)
    return _fields(file, f"{architecture}.")


def _fields(file: GgufFile, prefix: str) -> CheckpointFields:
    """What the file says under keys that begin with `prefix`, by the rest of the key."""
    under = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    return CheckpointFields(under, file.path, prefix)


def _text(file: GgufFile, fields: CheckpointFields) -> dict[str, Any]:
    for key in UNKNOWN_FEATURES:
        if value := fields.get(key):
            raise ModelUnsupported(file.path, f"{fields.prefix}{key} = {str(value)[:60]}")
    head_dim = _head_dim(fields)
    _refuse_partial_heads(fields, head_dim)
    _refuse_scaled_positions(file, fields)
    return {
        "vocab_size": fields.size("vocab_size", _vocabulary(file)),
        "hidden_size": fields.size("embedding_length"),
        "intermediate_size": fields.size("feed_forward_length"),
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": fields.size("attention.head_count"),
        "num_key_value_heads": fields.size("attention.head_count_kv", fields.size("attention.head_count")),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", ROPE_THETA),
        "max_position_embeddings": fields.size("context_length"),
        "sliding_window": fields.size("attention.sliding_window") if "attention.sliding_window" in fields else None,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _head_dim(fields: CheckpointFields) -> int:
    hidden, heads = fields.size("embedding_length"), fields.size("attention.head_count")
    return fields.size("attention.key_length", hidden // heads)


def _vocabulary(file: GgufFile) -> int:
    """Rows of the embedding; the file need not say their number."""
    embedding = file.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding else len(_tokens(file) or ())


def _refuse_partial_heads(fields: CheckpointFields, head_dim: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.size(key, head_dim) != head_dim:
            raise ModelUnsupported(fields.path, f"{fields.prefix}{key} = {fields.get(key)} for heads of {head_dim}")


def _refuse_scaled_positions(file: GgufFile, fields: CheckpointFields) -> None:
    """Rotary positions scaled by a rule, by a factor, or by a table, which old files have with nothing but ones."""
    kind = fields.text("rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if kind != "none" and (kind, factor) != ("linear", 1.0):
        raise ModelUnsupported(file.path, f"rotary positions that are scaled ({kind[:60]})")
    if factor != 1.0:
        raise ModelUnsupported(file.path, f"rotary positions that are scaled by {factor}")
    if "rope_freqs.weight" in file.tensors and not file.tensor("rope_freqs.weight").eq(1).all():
        raise ModelUnsupported(file.path, "rotary positions that are scaled by a table (rope_freqs)")


def _ends(file: GgufFile) -> dict[str, Any]:
    """The ids that begin and end a text; where an answer's end has one of its own, both."""
    metadata = file.metadata
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot")}
    ends = [id for id in (ids["eos"], ids["eot"]) if type(id) is int]
    found = {"bos_token_id": ids["bos"]} if type(ids["bos"]) is int else {}
    return found | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def _image_token_id(file: GgufFile) -> int | None:
    """The id of the token for pictures; None when there is none among its tokens."""
    tokens = _tokens(file)
    if tokens is None:
        return hf_config.IMAGE_TOKEN_ID
    return tokens.index(IMAGE_TOKEN) if IMAGE_TOKEN in tokens else None


def _tokens(file: GgufFile) -> list[Any] | None:
    """The texts of its tokens; None when it does not say them. Raises CheckpointCorrupt."""
    tokens = file.metadata.get(TOKENS)
    if tokens is not None and not isinstance(tokens, list):
        raise CheckpointCorrupt(file.path, f"its {TOKENS!r} is {str(tokens)[:60]!r} and not a list")
    return tokens


def _vision(file: GgufFile) -> dict[str, Any]:
    metadata = file.metadata
    kind = _projector(metadata)
    if kind != PROJECTOR:
        raise ModelUnsupported(file.path, f"a picture part of the kind {str(kind)[:60]!r} (known: {PROJECTOR!r})")
    fields = _fields(file, "clip.vision.")
    if fields.size("spatial_merge_size", 1) != 1 or "mm.patch_merger.weight" in file.tensors:
        raise ModelUnsupported(file.path, "patches that are merged before the projector")
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
        "rope_theta": CheckpointFields(metadata, file.path).number("clip.rope.freq_base", ROPE_THETA),
    }


def _projector(metadata: Mapping[str, Any]) -> Any:
    return metadata.get("clip.projector_type", metadata.get("clip.vision.projector_type"))


def _check_colours(fields: CheckpointFields, key: str, expected: tuple[float, ...]) -> None:
    """Pictures are normalised as for Pixtral; a tower that wants other pictures would see wrong colours."""
    found = fields.get(key)
    if found is None:
        return
    numbers = isinstance(found, list) and all(type(value) is float for value in found)
    if not numbers or len(found) != 3 or any(abs(a - b) > 1e-4 for a, b in zip(found, expected, strict=True)):
        raise ModelUnsupported(fields.path, f"{fields.prefix}{key} = {str(found)[:60]}")
