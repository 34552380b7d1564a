"""Repositories in the Hub's cache as its own library lays them out, written by hand."""

import hashlib
import os
import time
from pathlib import Path

from safetensors.torch import save

COMMIT = "c" * 40
DAYS = 86400  # seconds
HF = {"config.json": b"{}", "tokenizer.json": b'{"t": 1}'}


def weights(dtype="bfloat16", fill=1) -> bytes:
    import torch

    return save({"lm_head.weight": torch.full((64, 32), fill, dtype=getattr(torch, dtype))})


def put(hub: Path, repo: str, files: dict[str, bytes], commit=COMMIT, ref="main", linked=True, used_days_ago=None):
    """A repository in the Hub's cache, laid out as its own library does; `used_days_ago`: by pixtral."""
    root = hub / ("models--" + repo.replace("/", "--"))
    for name, content in files.items():
        path = root / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (root / "blobs").mkdir(exist_ok=True)
        if not linked:
            path.write_bytes(content)
            continue
        large = name.endswith((".safetensors", ".gguf"))
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = root / "blobs" / (hashlib.sha256(content).hexdigest() if large else git)
        blob.write_bytes(content)
        path.symlink_to(os.path.relpath(blob, path.parent))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    if used_days_ago is not None:
        used = Path(os.environ["PIXTRAL_CACHE"]) / "hub" / root.name / f"{commit}.used"
        used.parent.mkdir(parents=True, exist_ok=True)
        used.touch()
        when = time.time() - used_days_ago * DAYS
        for path in [used, *(each for each in root.rglob("*") if each.is_file() and not each.is_symlink())]:
            os.utime(path, (when, when))
    return root
