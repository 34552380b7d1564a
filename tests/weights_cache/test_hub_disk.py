"""Promises about a disk that is full or forbidden: a sentence, nothing half that is used, and a way to clear up."""

import errno
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save

from pixtral_cli.cli.main import run_program
from weights_cache import cache, inventory
from weights_cache.cache import CachedRepo
from weights_cache.errors import DiskFull, DownloadFailed
from weights_cache.hub import fetch

REPO = "acme/large"
NAMES = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
BYTES = 300_000


def shard(seed: int) -> bytes:
    return save({f"t{seed}": np.frombuffer(random.Random(seed).randbytes(BYTES), np.uint8)})


@pytest.fixture
def repo(hub, monkeypatch: pytest.MonkeyPatch):
    index = {"weight_map": {f"t{seed}": name for seed, name in enumerate(NAMES)}}
    side = {"config.json": b'{"model_type": "mistral"}', "tokenizer.json": b'{"model": {}}' * 500}
    weights = {name: shard(seed) for seed, name in enumerate(NAMES)}
    hub.repos[REPO] = side | weights | {"model.safetensors.index.json": json.dumps(index).encode()}
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    return hub


class Disk:
    """Holds `room` bytes more; then every write to it is refused, as by a file system that is full."""

    def __init__(self, room: int) -> None:
        self.room = room

    def replace(self, patched: pytest.MonkeyPatch) -> None:
        """From now on, every file that is opened by its Path lies on this disk."""

        def opened(path: Path, *options: object, **named: object):  # a function, which a Path binds, as no method is
            return self._open(path, *options, **named)

        patched.setattr(Path, "open", opened)

    def _open(self, path: Path, mode: str = "r", *options: object, **named: object):
        if not set(mode) & set("wax"):
            return open(path, mode, *options, **named)
        raw = FileOnDisk(path, mode.replace("b", "").replace("t", ""))
        raw.disk = self
        return io.BufferedWriter(raw) if "b" in mode else io.TextIOWrapper(io.BufferedWriter(raw), "utf-8")


class FileOnDisk(io.FileIO):
    disk: Disk

    def write(self, data) -> int:
        if not self.disk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(data[: self.disk.room])
        self.disk.room -= len(part)
        return super().write(part)


def debris(cache: Path) -> list[Path]:
    """Files in the Hub's cache that are neither whole, nor a part to go on with, nor a lock."""
    found = []
    for path in cache.rglob("*"):
        if not path.is_file() or path.is_symlink() or ".locks" in path.parts or path.parent.name == "refs":
            continue
        digests = hashlib.sha256(path.read_bytes()).hexdigest(), _git(path.read_bytes())
        if path.name not in (*digests, "CACHEDIR.TAG") and not path.name.endswith(".pixtral.incomplete"):
            found.append(path)
    return found


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROOMS = [0, 1, 100, 3000, 7000, 10_000, 50_000, 300_000, 310_000, 400_000, 600_000, 606_700]


@pytest.mark.parametrize("room", ROOMS)
def test_a_disk_that_fills_while_files_arrive_is_a_sentence_and_what_arrived_is_gone_on_with(repo, monkeypatch, room):
    disk = Disk(room)
    with monkeypatch.context() as patched:
        disk.replace(patched)
        with pytest.raises(DownloadFailed, match="No space left on device") as caught:
            fetch(REPO)
    assert "HF_HUB_CACHE" in caught.value.hint and "\n" not in str(caught.value)
    assert disk.room == 0 and cache.find(REPO, "main", weights=True) is None
    assert debris(cache.hub_cache_folder()) == []

    repo.requests.clear()
    folder = fetch(REPO)
    assert all((folder / name).read_bytes() == content for name, content in repo.repos[REPO].items())
    large = [int(h.get("range", "=0-")[6:-1] or 0) for m, p, h in repo.requests if m == "GET" and p.endswith("tensors")]
    assert sum(BYTES - start for start in large) <= 2 * BYTES - max(room - 20_000, 0)


@pytest.mark.parametrize("room", [50_000, 400_000])
@pytest.mark.parametrize("command", [["remove", REPO], ["prune", "--older-than", "0h"]])
def test_the_part_that_a_full_disk_left_is_listed_and_can_be_cleared(repo, monkeypatch, room, command):
    with monkeypatch.context() as patched:
        Disk(room).replace(patched)
        with pytest.raises(DownloadFailed):
            fetch(REPO)
    (model,) = inventory.models()
    assert (model.name, model.format) == (REPO, "incomplete") and model.nbytes > room - 20_000
    assert run_program(["cache", *command, "--yes", "--quiet"]) == 0
    assert inventory.models() == [] and not CachedRepo(REPO).folder.exists()


def test_the_kernels_own_refusal_reads_the_same(repo):
    """A file may not grow beyond 100,000 bytes, as on a file system with a limit (of 4 GB, say)."""
    code = f"""
import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import sys; from pixtral_cli.cli.main import run_program; sys.exit(run_program(["download", {REPO!r}]))"""
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=kept, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert "File too large" in done.stderr and "HF_HUB_CACHE" in done.stderr and len(done.stderr.splitlines()) == 2
    assert debris(cache.hub_cache_folder()) == []


def test_what_does_not_fit_is_refused_before_the_first_byte(repo, monkeypatch):
    first = {"config.json", "model.safetensors.index.json"}
    needed = sum(len(content) for name, content in repo.repos[REPO].items() if name not in first)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(DiskFull):
        fetch(REPO)
    assert repo.fetched() == ["config.json", "model.safetensors.index.json"]  # whether it runs; how much the rest is
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    assert fetch(REPO)


def test_small_files_without_weights_are_listed_too_and_can_be_cleared(repo):
    fetch(REPO, weights=False)
    assert [(model.name, model.format) for model in inventory.models()] == [(REPO, "incomplete")]
    assert run_program(["cache", "prune", "--older-than", "0h", "--yes", "--quiet"]) == 0
    assert inventory.models() == [] and not CachedRepo(REPO).folder.exists()
