"""Headers of safetensors files altered at random, in every form that we read: a clean error or a file that can be
read to its last tensor, and never much memory."""

import copy
import hashlib
import json
import random
import re
import resource
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from weights_cache import checkpoint, inventory
from weights_cache.checkpoint import SerializedCheckpoint
from weights_cache.codecs.nf4 import NF4, TABLE
from weights_cache.errors import WeightsError
from weights_cache.formats.serialized import verify_path
from weights_cache.formats.serialized_writer import Weight, write
from weights_cache.packed import PackedRows, parts

EXTREMES = [0, 1, 7, 9, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**400]
WORDS = [*"F32 BF16 U8 F64 BOOL F4 q4_0 nf4 bfloat16 null -1 1e9 [] {} NaN".split(), ""]
ENOUGH = 2_000_000  # bytes of Python's own; a file has some 3,000
PARAMS = {"dim": 4, "n_layers": 1, "head_dim": 4, "hidden_dim": 8, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5}
PARAMS |= {"vocab_size": 8, "rope_theta": 1e4}
NAMES = {"native": "consolidated.safetensors", "serialized": "model.pixtral"}
ADDRESSES = 2**30  # bytes of addresses for all threads, mappings and tensors that one file may ask for


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The four forms that a safetensors file can have here: name -> content."""
    folder = tmp_path_factory.mktemp("originals")
    plain = {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 6), "lm_head.weight": torch.ones(3, 5).bfloat16()}
    native = {"layers.0.attention.wq.weight": torch.ones(8, 4), "output.weight": torch.zeros(0, 4)}
    _write_serialized(folder / "serialized")
    return {
        "hf": save(plain, {"format": "pt"}),
        "native": save(native),
        "bitsandbytes": _bitsandbytes(folder / "bitsandbytes.safetensors"),
        "serialized": (folder / "serialized").read_bytes(),
    }


def _write_serialized(path: Path) -> None:
    """Plain, packed and nf4 weights, written by ourselves: nobody else does."""
    rows = PackedRows("q4_0", torch.zeros(4, 18, dtype=torch.uint8))
    codes = NF4(torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2))
    weights = [
        Weight("a.weight", "q4_0", (4, 32), {"rows": (torch.uint8, (4, 18))}, lambda: rows),
        Weight("n", "float32", (3,), {"": (torch.float32, (3,))}, lambda: torch.ones(3)),
        Weight("b.weight", "nf4", (2, 64), parts("nf4", (2, 64)), lambda: codes),
    ]
    files = {"config.json": b'{"architectures": ["x"]}', "tokenizer.json": b"{}"}
    write(path, weights, files, model="m", form="hf", encoding="q4_0")


def _bitsandbytes(path: Path) -> bytes:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        {
            name: torch.zeros(64, 1, dtype=torch.uint8),
            f"{name}.absmax": torch.ones(2),
            f"{name}.quant_map": torch.tensor(TABLE),
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        },
        path,
    )
    return path.read_bytes()


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` with changes in its header: of what it says in one half, of its bytes or its length in the other."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    header = _other_words(header, chance) if chance.random() < 0.5 else _other_bytes(header, chance)
    if chance.random() < 0.05:
        rest = rest[: chance.randrange(len(rest) + 1)]
    claimed = len(header)
    if chance.random() < 0.1:
        claimed = chance.choice([*EXTREMES, claimed - 1, claimed + 1, claimed + len(rest)]) % 2**64
    return struct.pack("<Q", claimed) + header + rest


def _other_bytes(header: bytes, chance: random.Random) -> bytes:
    """One or two changes: bits, bytes, numbers and words replaced, pieces doubled or dropped."""
    changed = bytearray(header)
    for _ in range(chance.randint(1, 2)):
        at = chance.randrange(len(changed))
        match chance.randrange(6):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed[at] = chance.randrange(256)
            case 2:
                _replace(changed, rb"\d+", str(chance.choice(EXTREMES)).encode(), chance)
            case 3:
                _replace(changed, rb"\w+", chance.choice(WORDS).encode(), chance)
            case 4:
                changed[at:at] = changed[chance.randrange(len(changed)) :][: chance.randrange(64)]
            case 5:
                del changed[at : at + chance.randrange(64)]
    return bytes(changed)


def _replace(header: bytearray, pattern: bytes, word: bytes, chance: random.Random) -> None:
    if found := list(re.finditer(pattern, bytes(header))):
        match = chance.choice(found)
        header[match.start() : match.end()] = word


def _other_words(header: bytes, chance: random.Random) -> bytes:
    """One to three values of the header, or of the manifest in it, are dropped, exchanged or become something else."""
    said = json.loads(header)
    manifest = said.get("__metadata__", {}).get("pixtral")
    if manifest and chance.random() < 0.7:
        said["__metadata__"]["pixtral"] = json.dumps(_changed(json.loads(manifest), chance))
    else:
        said = _changed(said, chance)
    return json.dumps(said).encode()


def _changed(tree: Any, chance: random.Random) -> Any:
    for _ in range(chance.randint(1, 3)):
        places = [
            (node, key) for node in _nodes(tree) for key in (node if isinstance(node, dict) else range(len(node)))
        ]
        if not places:
            return tree
        node, key = chance.choice(places)
        other, at = chance.choice(places)
        match chance.randrange(4):
            case 0:
                del node[key]
            case 1:
                node[key] = copy.deepcopy(other[at])
            case 2:
                node[key] = chance.choice([*EXTREMES, *WORDS, -1, 0.5, None, True, [], {}, [[]], "\ud800", "a\nb"])
            case 3 if isinstance(node, dict):
                node[chance.choice(WORDS)] = node.pop(key)
    return tree


def _nodes(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        yield tree
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _nodes(child)


def sealed(data: bytes) -> bytes:
    """A serialized model whose seal fits its header, as someone who means harm would write it."""
    length = int.from_bytes(data[:8], "little")
    return data[:-32] + hashlib.sha256(data[8 : 8 + length]).digest()


@contextmanager
def little_room() -> Iterator[None]:
    """No more than ADDRESSES beyond what the process has mapped: who wants more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read_all(path: Path, kind: str) -> None:
    """Everything that any command reads of such a file; no tensor may be larger than the file allows."""
    if kind == "serialized":
        opened: checkpoint.Checkpoint = SerializedCheckpoint(path)
        _ = opened.generation_config, opened.side_files(), verify_path(path)
    else:
        opened = checkpoint.open(path.parent, form="native" if kind == "native" else "hf")
        inventory.main_encoding(path, path.parent)
    most = 64 * path.stat().st_size
    for name in opened.tensors:
        assert opened.tensor(name).nbytes <= most and opened.weight(name).nbytes <= most


def put(folder: Path, kind: str, data: bytes) -> Path:
    """`data` as a model of that kind in `folder`, with what belongs beside it."""
    (folder / "config.json").write_text("{}")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    path = folder / NAMES.get(kind, "model.safetensors")
    path.write_bytes(data)
    return path


def outcomes(originals: dict[str, bytes], folder: Path, seeds: range) -> dict[str, dict[str, int]]:
    """How many of the altered files of each form opened, and how many were refused."""
    seen = {kind: {"opened": 0, "refused": 0} for kind in originals}
    tracemalloc.start()
    try:
        with little_room():
            for seed in seeds:
                chance = random.Random(seed)
                kind = chance.choice([*originals])
                data = mutated(originals[kind], chance)
                path = put(folder, kind, sealed(data) if kind == "serialized" and chance.random() < 0.8 else data)
                tracemalloc.reset_peak()
                try:
                    read_all(path, kind)
                    seen[kind]["opened"] += 1
                except WeightsError as error:
                    assert "\n" not in str(error) and len(str(error)) < 1500
                    seen[kind]["refused"] += 1
                except Exception as error:
                    raise AssertionError(f"seed {seed}: a {kind} file") from error
                assert tracemalloc.get_traced_memory()[1] < ENOUGH, f"seed {seed}"
    finally:
        tracemalloc.stop()
    return seen


def test_400_altered_headers_are_read_or_refused_in_a_sentence(originals, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "cache"))
    seen = outcomes(originals, tmp_path, range(400))
    assert all(each["refused"] > 50 for each in seen.values()), seen


@pytest.mark.slow
def test_10000_altered_headers_are_read_or_refused_in_a_sentence(originals, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "cache"))
    seen = outcomes(originals, tmp_path, range(10_000))
    assert all(each["opened"] > 10 for each in seen.values()), seen  # the changes are not all fatal


def test_the_files_are_read_to_their_last_tensor_before_they_are_altered(originals, tmp_path, monkeypatch):
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "cache"))
    for kind, data in originals.items():
        read_all(put(tmp_path, kind, data), kind)
