"""A checkpoint in, the same weights as a Hugging Face folder out, decoded, a shard a layer. Writes no tokenizer."""

from __future__ import annotations

import json
import shutil
from itertools import groupby
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pixtral_cli.errors import ModelError
from pixtral_cli.model.load import DTYPES
from weights_cache import names
from weights_cache.checkpoint import Checkpoint
from weights_cache.codecs.nf4 import NF4, TABLE
from weights_cache.encodings import ENCODINGS
from weights_cache.names import BITSANDBYTES_STATE
from weights_cache.packed import plain
from weights_cache.wording import size

DTYPE = "bnb_4bit_compute_dtype"
QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_skip_modules": ["vision_tower", "multi_modal_projector"],
}
"""What transformers is told of such a folder; the head is packed like the other matrices of the text model."""


def write(checkpoint: Checkpoint, dtype: str, folder: Path, *, packed: bool = False) -> None:
    """Write config.json and shards of the weights in `dtype`, "bfloat16" or "float32". With `packed`, matrices in nf4
    stay so, as bitsandbytes saves them.

    Raises ModelError when there is no room for them on the disk.
    """
    nbytes = ENCODINGS[dtype].block_bytes * sum(prod(info.shape) for info in checkpoint.tensors.values())
    free = shutil.disk_usage(folder.parent).free
    if nbytes > free:
        raise ModelError(f"its weights take {size(nbytes)} of disk, and {folder.parent} has {size(free)} free.")
    folder.mkdir()
    sees, index = "vision_config" in checkpoint.config, dict[str, str]()
    for number, (_, group) in enumerate(groupby(checkpoint.tensors, lambda name: name.rpartition("layers.")[2][:3])):
        file, shard = f"model-{number:05d}.safetensors", dict[str, Tensor]()
        for name in group:
            weight, theirs = checkpoint.weight(name), names.to_hf(name, sees)
            if packed and isinstance(weight, NF4):
                shard |= bitsandbytes_tensors(theirs, weight, dtype)
            else:
                shard[theirs] = plain(weight).to(DTYPES[dtype]).contiguous()
            checkpoint.release(name)
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": nbytes}, "weight_map": index})
    )
    config = checkpoint.config | ({"quantization_config": QUANTIZATION | {DTYPE: dtype}} if packed else {})
    (folder / "config.json").write_text(json.dumps(config))


def bitsandbytes_tensors(name: str, weight: NF4, dtype: str) -> dict[str, Tensor]:
    """What bitsandbytes saves of a matrix: its `QuantState.as_dict(packed=True)`, and the codes in one column."""
    plain_scales = weight.unnested()
    state = {"quant_type": "nf4", "blocksize": weight.block, "dtype": dtype, "shape": list(weight.shape)}
    return {
        name: weight.codes.reshape(-1, 1).contiguous(),
        f"{name}.absmax": plain_scales.absmax.clone(),
        f"{name}.quant_map": torch.tensor(TABLE),
        f"{name}{BITSANDBYTES_STATE}nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
