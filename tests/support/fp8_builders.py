"""A Hugging Face folder's linear layers in FP8, with the names and scales that Mistral and others publish.

Written for tests, apart from the reader under test. What the codes stand for is said by transformers' own dequantiser.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from . import builders

TENSOR, ROWS, BLOCKS = "one scale", "a scale a row", "a scale a block"
KINDS = (TENSOR, ROWS, BLOCKS)
BLOCK = 32
SKIPPED = ["model.vision_tower", "model.multi_modal_projector", "lm_head", "of.nothing"]
PARAMS = {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
"""What params.json says of a native folder."""


def encoded(weight: Tensor, kind: str, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [R, C] and its scale: bfloat16 [], float32 [R, 1], or a float32 grid."""
    rows, columns = weight.shape
    if kind == TENSOR:
        scale = (weight.abs().max() / 448).bfloat16()
        return (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scale
    if kind == ROWS:
        scale = weight.abs().amax(1, keepdim=True) / 448
        return (weight / scale).to(torch.float8_e4m3fn), scale
    parts = weight.view(rows // block, block, columns // block, block)
    scale = parts.abs().amax((1, 3)) / 448
    return (parts / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns), scale


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """As transformers does it, in float32."""
    return Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)


def convert(folder: Path, kind: str, static: bool = True) -> dict[str, Tensor]:
    """Put the matrices of the text model's layers into FP8, in place -> all weights, those decoded."""
    tensors, exact = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        exact[name] = weight
        if "vision" in name or not name.endswith("_proj.weight"):
            tensors[name] = weight.clone()
            continue
        tensors[name], tensors[f"{name}_scale_inv"] = encoded(weight.float(), kind)
        exact[name] = decoded(tensors[name], tensors[f"{name}_scale_inv"])
        if static:
            tensors[name.replace("weight", "activation_scale")] = torch.tensor(0.5, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    section = {
        "quant_method": "fp8",
        "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": [BLOCK, BLOCK] if kind == BLOCKS else None,
        "dequantize": False,
        "modules_to_not_convert": SKIPPED,
    }
    builders.edit_config(folder, lambda config: config.update(quantization_config=section))
    return exact


def edit(folder: Path, change) -> None:
    """Rewrite the folder's one weights file after `change(tensors)`."""
    path = next(folder.glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def as_native(folder: Path) -> None:
    """Mark a native folder's params.json as in FP8, and add a range that Mistral leaves there."""
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | PARAMS))
    edit(folder, lambda tensors: tensors.update({"layers.0.attention.kv_fake_quantizer.qscale_act": torch.ones(1)}))
