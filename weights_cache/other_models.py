"""Tells by a config that a model is of another kind than those that run here, and in words what it is.

What is not told here is left to whoever builds models: a config that no one knows is refused there. Sources:
transformers' `model_type` and the keys of its configs, vLLM's reading of params.json, and llama.cpp's names of
architectures.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import OtherModel

DENSE = (
    "Take a model without experts, such as Ministral 3, Mistral Small 3.2 or Magistral Small: in bfloat16, in FP8, "
    "in bitsandbytes' nf4 or as a GGUF."
)
SEEING = (
    "Take one that looks at pictures with Pixtral's tower, such as Pixtral, Mistral Small 3.2 or Ministral 3: in "
    "bfloat16, in FP8, in bitsandbytes' nf4 or as a GGUF."
)
DRAFTED = "Take the model that it drafts for. --speculative needs no second model."

EXPERTS, LATENT = "a mixture of experts", "latent attention"
AUDIO = "a model that listens"
DRAFT = "an EAGLE head, which drafts for another model and is no whole one"

NAMED: Mapping[str, tuple[str, str]] = {
    "mistral4": ("Mistral Small 4, a mixture of experts with latent attention", DENSE),
    "mistral_large4": ("Mistral Large 4, a mixture of experts with latent attention", DENSE),
    "mistral_large4_text": ("Mistral Large 4, a mixture of experts with latent attention", DENSE),
    "mixtral": ("Mixtral, a mixture of experts", DENSE),
    "deepseek2": ("a mixture of experts with latent attention, as DeepSeek-V3 and Mistral Large 3 are", DENSE),
    "voxtral": ("Voxtral, which listens", SEEING),
    "voxtral_realtime": ("Voxtral Realtime, which listens", SEEING),
    "llava_next": ("LLaVA-NeXT, which cuts pictures into tiles", SEEING),
    "llava_next_video": ("LLaVA-NeXT-Video, which watches films", SEEING),
    "llava_onevision": ("LLaVA-OneVision, which cuts pictures into tiles", SEEING),
    "video_llava": ("Video-LLaVA, which watches films", SEEING),
    "vipllava": ("VipLLaVA, which looks at several layers of its tower", SEEING),
}
"""A config's `model_type`, its text part's, or a GGUF's architecture -> what it is, and what to take instead."""

TOWERS: Mapping[str, str] = {
    "siglip": "SigLIP's",
    "dinov2": "DINOv2's",
    "intern_vit": "InternViT's",
    "aimv2": "AIMv2's",
    "qwen": "Qwen's",
}
"""How a `vision_config`'s model_type begins -> whose tower it is."""

TEXTS: Mapping[str, str] = {
    "qwen": "Qwen's",
    "gemma": "Gemma's",
    "phi": "Phi's",
    "deepseek": "DeepSeek's",
    "internlm": "InternLM's",
    "mpt": "MPT's",
}
"""How the model_type of a model, or of the text part of one that sees, begins -> whose it is."""

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
NATIVE_SIZES: Mapping[str, tuple[int, int]] = {"Mistral Large 3": (7168, 61), "Mistral Small 4": (4096, 36)}
"""Width and layers of those of Mistral's own mixtures of experts with latent attention that have no other name."""


def refuse(where: Path | str, config: Mapping[str, Any]) -> None:
    """Raise OtherModel if `config`, as Hugging Face writes it, is of a model that is known not to run here."""
    if found := _of_config(config):
        raise OtherModel(where, *found)


def refuse_native(where: Path | str, params: Mapping[str, Any]) -> None:
    """As `refuse`, of the object in a params.json. What is null, false or empty is not there."""
    if found := _of_native(params):
        raise OtherModel(where, *found)


def refuse_gguf(where: Path | str, architecture: str, metadata: Mapping[str, Any]) -> None:
    """As `refuse`, of what a GGUF of text says."""
    if architecture in NAMED:
        raise OtherModel(where, *NAMED[architecture])
    key = f"{architecture}.expert_count"
    if count := metadata.get(key):
        raise OtherModel(where, f"{EXPERTS} ({key} = {str(count)[:20]})", DENSE)


def _of_config(config: Mapping[str, Any]) -> tuple[str, str] | None:
    text, vision = _section(config, "text_config"), _section(config, "vision_config")
    kind, seen, spoken = (str(part.get("model_type") or "").lower()[:60] for part in (config, vision, text))
    architectures = config.get("architectures")
    if "eagle" in f"{architectures} {kind}".lower() or "speculators_config" in config:
        return DRAFT, DRAFTED
    named = next((NAMED[each] for each in (spoken, kind) if each in NAMED), None)
    label = next((each for each in (spoken, kind) if each), str(architectures)[:60])
    if named := named or _with_experts(label, config, text):
        return named
    if "audio_config" in config:
        return f"{AUDIO} ({kind})", SEEING
    if owner := _begins(seen, TOWERS):
        return f"a model whose vision tower is {owner} ({seen})", SEEING
    if owner := _begins(spoken, TEXTS):
        return f"a model whose text part is {owner} ({spoken})", SEEING
    if owner := _begins(kind, TEXTS):
        return f"one of {owner} models ({kind})", SEEING
    return None


def _with_experts(label: str, *sections: Mapping[str, Any]) -> tuple[str, str] | None:
    counts = [section.get(key) for section in sections for key in EXPERT_COUNTS]
    has_experts = any(type(count) is int and count > 1 for count in counts)
    is_latent = any(section.get("kv_lora_rank") for section in sections)
    if not has_experts and not is_latent:
        return None
    what = " with ".join(word for word, is_there in ((EXPERTS, has_experts), (LATENT, is_latent)) if is_there)
    return f"{what if has_experts else f'a model with {LATENT}'} ({label})", DENSE


def _of_native(params: Mapping[str, Any]) -> tuple[str, str] | None:
    if _section(params, "multimodal").get("whisper_model_args"):
        return "Voxtral, which listens", SEEING
    experts = "moe" if params.get("moe") else None
    latent = next((key for key in ("kv_lora_rank", "q_lora_rank") if params.get(key)), None)
    if not experts:
        return (f"a model with {LATENT} ({latent}), as heads that draft for larger ones are", DENSE) if latent else None
    if not latent:
        return f"{EXPERTS} ({experts})", DENSE
    sizes = params.get("dim"), params.get("n_layers")
    name = next((name for name, known in NATIVE_SIZES.items() if known == sizes), None)
    return f"{f'{name}, ' if name else ''}{EXPERTS} ({experts}) with {LATENT} ({latent})", DENSE


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = config.get(key)
    return found if isinstance(found, Mapping) else {}


def _begins(kind: str, owners: Mapping[str, str]) -> str | None:
    return next((owner for prefix, owner in owners.items() if kind.startswith(prefix)), None)
