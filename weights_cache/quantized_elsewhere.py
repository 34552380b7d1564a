"""Tells by a config, and by the names of the files beside it, whether another program quantised the weights.

Such weights have other names, shapes and types than the model's own, so that nothing but the config says what they
are. bitsandbytes' nf4, and e4m3 codes with scales, are read here. Sources: transformers' `quantization_config`, MLX's
`quantization`, the files that AutoGPTQ, AutoAWQ and NVIDIA's ModelOpt write beside a config, and `quantization` in
vLLM's reading of params.json.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from . import layout
from .errors import QuantizedElsewhere

KEYS = ("quantization_config", "compression_config", "quantization")
FILES: Mapping[str, str] = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Files beside a config that only such weights have -> the method."""

DETAILS = ("format", "quant_algo", "qformat_weight", "w_bit", "bits")
"""Keys that say which of a method's encodings it is, the most telling first."""

FP8 = ("fp8", "fp8_e4m3")
"""What transformers and Mistral's own form call it."""

UNNAMED = "a method that its config does not name"


def refuse(
    where: Path | str, config: Mapping[str, Any], names: Collection[str] = (), form: layout.Form | None = None
) -> None:
    """Raise QuantizedElsewhere if `config`, or a file among `names` beside it, says so.

    `form` is the config's own, where one of the others that are there can be taken instead.
    """
    beside = () if form == "native" else names
    method = _by_config(config) or next((method for name, method in FILES.items() if name in beside), None)
    if method:
        others = [each for each in layout.forms(names) if each != form] if form else []
        raise QuantizedElsewhere(where, method, next(iter(others), None))


def _by_config(config: Mapping[str, Any]) -> str | None:
    """What quantised the weights that `config` describes, as a whole or in its text part; None for what is read."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, Mapping) else {}):
        for key in KEYS:
            if (found := section.get(key)) and (method := _described(key, found)):
                return method
    return None


def _described(key: str, found: Any) -> str | None:
    if not isinstance(found, Mapping):
        return found[:60] if isinstance(found, str) else UNNAMED
    method = found.get("quant_method") or _implied(key, found)
    if method == "bitsandbytes":
        return _of_bitsandbytes(found)
    if method in FP8 or (method, found.get("format")) == ("compressed-tensors", "float-quantized"):
        return None
    detail = next((found[each] for each in DETAILS if found.get(each)), None)
    if detail is None or detail == method:
        return str(method)[:60]
    return f"{str(method)[:60]} ({f'{detail} bits' if isinstance(detail, int) else str(detail)[:60]})"


def _implied(key: str, found: Mapping[str, Any]) -> str:
    """The method of a section that does not name one."""
    if "load_in_4bit" in found or "load_in_8bit" in found:
        return "bitsandbytes"
    if "group_size" in found and "bits" in found:
        return "MLX"
    producer = found.get("producer")
    named = producer.get("name") if isinstance(producer, Mapping) else found.get("qformat_weight")
    return str(named) if named else UNNAMED


def _of_bitsandbytes(found: Mapping[str, Any]) -> str | None:
    """Its 8-bit integers and fp4; None for nf4, and where the tensors will say it."""
    if found.get("load_in_8bit"):
        return "bitsandbytes' 8-bit integers"
    kind = found.get("bnb_4bit_quant_type", "nf4")
    return None if kind == "nf4" else f"bitsandbytes' {str(kind)[:60]}"
