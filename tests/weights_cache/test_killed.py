"""Killed at its every step, a download or an export leaves nothing half-written that is used, and can be repeated."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

ROOT = Path(__file__).parents[2]
DOWNLOAD = """
import shutil, sys
from pathlib import Path
import huggingface_hub.constants as constants
constants.DOWNLOAD_CHUNK_SIZE = 20_000
import huggingface_hub.file_download
from support import kill_points
from weights_cache import inventory, cache
from weights_cache.cache import CachedRepo
from weights_cache.hub import fetch
watched, repo, sizes = Path(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
fetching = lambda step: fetch(repo, progress=step)
at = 0
while not kill_points.run(fetching, watched, at):
    found = cache.find(repo, "main", weights=True)
    snapshots = list(CachedRepo(repo).folder.glob("snapshots/*/*"))
    for path in snapshots:
        assert path.name.startswith(".") or path.stat().st_size == sizes[path.name], (at, path)
    assert found is None or len(snapshots) == len(sizes), at
    list(inventory.models())
    assert kill_points.run(fetching, watched), at
    found = cache.find(repo, "main", weights=True)
    assert found and {name: (found / name).stat().st_size for name in sizes} == sizes, at
    assert all(not inventory.altered(model) for model in inventory.models()), at
    assert [model.format for model in inventory.models()] == ["hf"], at
    shutil.rmtree(watched)
    at += 1
print(at)
"""
EXPORT = """
import sys
from pathlib import Path
import torch
from support import kill_points
from pixtral_cli.encoding_choices import find
from pixtral_cli.model import load, save
from pixtral_cli.source import Source
from weights_cache import inventory
from weights_cache.formats.serialized import verify_path
target, old = Path(sys.argv[1]), sys.argv[2] == "over"
source = Source.open("tiny")
older, newer = source.placement(None), source.placement(find("q4_0"))
write = lambda step, placement=newer: source.save(target, placement, progress=step)
at, seen = 0, set()
while not kill_points.run(write, target.parent, at):
    if target.exists():
        seen.add(verify_path(target).manifest.encoding)
    else:
        assert not old, at
        seen.add(None)
    assert len(inventory.models()) <= 1
    at += 1
    if at % 10 == 0 or at < 10:
        target.unlink(missing_ok=True)
        assert kill_points.run(write, target.parent)
        assert verify_path(target).manifest.encoding == "q4_0"
        target.unlink()
    if old:
        write(None, older)
    elif target.exists():
        target.unlink()
assert verify_path(target).manifest.encoding == "q4_0"
print(at, sorted(map(str, seen)))
"""


def run(code: str, *arguments: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    kept |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=kept, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_download_killed_at_its_every_step(hub, tmp_path):
    weights = save({"a": np.frombuffer(random.Random(0).randbytes(90_000), np.uint8)})
    files = {"config.json": b"{}", "tokenizer.json": b'{"model": {}}', "model.safetensors": weights}
    hub.repos["acme/killed"] = files
    sizes = {name: len(content) for name, content in files.items()}
    steps = int(run(DOWNLOAD, str(tmp_path / "home"), "acme/killed", repr(sizes)))
    assert steps > 25


@pytest.mark.slow
@pytest.mark.parametrize(("before", "seen"), [("over", ["bfloat16", "q4_0"]), ("new", ["None", "q4_0"])])
def test_an_export_killed_at_its_every_step(tmp_path, monkeypatch, before, seen):
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    code = EXPORT if before == "new" else EXPORT.replace("at, seen = 0", "write(None, older); at, seen = 0")
    steps, _, found = run(code, str(tmp_path / "out/model.pixtral"), before).partition(" ")
    assert int(steps) > 25 and found.strip() == str(seen)
