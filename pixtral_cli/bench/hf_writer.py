"""A checkpoint in, the same weights as a Hugging Face folder out, decoded, a shard a layer. Writes no tokenizer."""

from __future__ import annotations

import json
import shutil
from itertools import groupby
from math import prod
from pathlib import Path

from safetensors.torch import save_file

from pixtral_cli.errors import ModelError
from pixtral_cli.model.load import DTYPES
from weights_cache import names
from weights_cache.checkpoint import Checkpoint
from weights_cache.encodings import ENCODINGS
from weights_cache.wording import size


def write(checkpoint: Checkpoint, dtype: str, folder: Path) -> None:
    """Write config.json and shards of the weights in `dtype`, "bfloat16" or "float32".

    Raises ModelError when there is no room for them on the disk.
    """
    nbytes = ENCODINGS[dtype].block_bytes * sum(prod(info.shape) for info in checkpoint.tensors.values())
    free = shutil.disk_usage(folder.parent).free
    if nbytes > free:
        raise ModelError(f"its weights take {size(nbytes)} of disk, and {folder.parent} has {size(free)} free.")
    folder.mkdir()
    sees, index = "vision_config" in checkpoint.config, dict[str, str]()
    for number, (_, group) in enumerate(groupby(checkpoint.tensors, lambda name: name.rpartition("layers.")[2][:3])):
        file, shard = f"model-{number:05d}.safetensors", {}
        for name in group:
            shard[names.to_hf(name, sees)] = checkpoint.tensor(name).to(DTYPES[dtype]).contiguous()
            checkpoint.release(name)
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": nbytes}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
