"""Promises of looking at a remote model: all headers, no weights."""

import json
import random
from pathlib import Path

import pytest
from safetensors.torch import save

from weights_cache import cache, checkpoint
from weights_cache.errors import DownloadFailed, Gated, Offline
from weights_cache.hub import fetch, fetch_headers

REPO = "acme/remote"
SIDE = {"config.json": b"{}", "tokenizer.json": b'{"t": 1}'}
SIZES = 1000, 1500


def large(rows: int) -> bytes:
    import torch

    return save({f"model.layers.{n}.mlp.up_proj.weight": torch.full((rows, 500), n / 7) for n in range(2)})


def gguf(path: Path, words: int) -> bytes:
    import gguf
    import numpy as np
    from support import format_builders

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_token_list([str(random.Random(n).random()) for n in range(words)])
    writer.add_tensor("output.weight", np.ones((2000, 512), np.float32))
    format_builders.finish(writer)
    return path.read_bytes()


@pytest.fixture
def repo(hub):
    """A repository of two shards of 4 and 6 MB."""
    shards = {f"model-0000{n}-of-00002.safetensors": large(rows) for n, rows in enumerate(SIZES, 1)}
    second = large(SIZES[1]).replace(b"layers.0", b"layers.2").replace(b"layers.1", b"layers.3")
    shards["model-00002-of-00002.safetensors"] = second
    names = [(2 * n + layer, file) for n, file in enumerate(shards) for layer in (0, 1)]
    index = {"weight_map": {f"model.layers.{layer}.mlp.up_proj.weight": file for layer, file in names}}
    hub.repos[REPO] = SIDE | shards | {"model.safetensors.index.json": json.dumps(index).encode()}
    return hub


def described(path: Path) -> dict:
    tensors = checkpoint.open(path).tensors
    return {n: (t.dtype, t.shape, t.nbytes, t.encoding, t.file.name, t.file.stat().st_size) for n, t in tensors.items()}


def asked_bytes(repo) -> int:
    """The bytes of weights that were asked for; all of a file where no range was named."""
    total = 0
    for method, path, headers in repo.requests:
        if method == "GET" and path.endswith((".safetensors", ".gguf")):
            begin, end = headers["range"].removeprefix("bytes=").split("-")
            total += int(end) + 1 - int(begin)
    return total


def test_the_headers_are_those_of_the_whole_model_and_no_weights_are_fetched(repo, tmp_path: Path):
    folder = fetch_headers(REPO, tmp_path / "skeleton")
    seen = described(folder)
    assert folder.is_relative_to(tmp_path / "skeleton") and len(seen) == 4
    assert asked_bytes(repo) <= 2 * 2**18 < sum(map(len, repo.repos[REPO].values())) / 10
    assert cache.find(REPO, "main", weights=True) is None
    assert seen == described(fetch(REPO))


def test_it_takes_no_more_room_than_the_headers(repo, tmp_path: Path):
    folder = fetch_headers(REPO, tmp_path / "skeleton")
    assert sum(path.stat().st_blocks * 512 for path in folder.glob("*.safetensors")) < 2**20


def test_a_server_without_ranges_is_left_after_the_headers(repo, tmp_path: Path):
    repo.ranges = False
    assert len(described(fetch_headers(REPO, tmp_path / "skeleton"))) == 4


def test_a_header_longer_than_the_first_piece_is_fetched_to_its_end(repo, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("weights_cache.download.HEADER_BYTES", {".safetensors": 20})
    assert described(fetch_headers(REPO, tmp_path / "skeleton")) == described(fetch(REPO))


def test_a_gguf_and_its_long_list_of_words_are_read_without_its_weights(repo, tmp_path: Path, monkeypatch):
    from weights_cache.formats.gguf import GgufFile

    content = gguf(tmp_path / "x.gguf", 5000)
    repo.repos["acme/gguf"] = {"x.gguf": content}
    monkeypatch.setattr("weights_cache.download.HEADER_BYTES", {".gguf": 2**12})
    file = GgufFile(fetch_headers("acme/gguf:x.gguf", tmp_path / "skeleton"))
    assert file.tensors["output.weight"].shape == (2000, 512) and len(file.metadata["tokenizer.ggml.tokens"]) == 5000
    assert asked_bytes(repo) < len(content) / 4


def put_gguf(repo, tmp_path: Path, name: str, pictures: str) -> None:
    """A Pixtral as a GGUF of some hundred kB and its picture part, in the folders of acme/whole."""
    from support import builders, format_builders

    folder = tmp_path / "hf"
    builders.pixtral(folder, hidden_size=128)
    builders.add_processor(folder)
    format_builders.gguf_text(folder, tmp_path / "text.gguf")
    format_builders.gguf_pictures(folder, tmp_path / "pictures.gguf")
    repo.repos["acme/whole"] = {
        name: (tmp_path / "text.gguf").read_bytes(),
        pictures: (tmp_path / "pictures.gguf").read_bytes(),
    }


@pytest.mark.parametrize("name", ["model.gguf", "q8/model.gguf"])
def test_tokens_of_a_remote_gguf_cost_its_headers_only_and_the_second_time_nothing(
    repo, tmp_path: Path, monkeypatch, name
):
    from pixtral_cli.source import Source

    put_gguf(repo, tmp_path, name, "mmproj/mmproj.gguf")
    monkeypatch.setattr("weights_cache.download.HEADER_BYTES", {".gguf": 2**12})
    content = repo.repos["acme/whole"]
    message = [{"role": "user", "content": "what is in the picture?"}]

    found = Source.open(f"acme/whole:{name}", weights=False)
    ids = found.chat(message).token_ids
    assert found.config.vision is not None and 0 < asked_bytes(repo) < sum(map(len, content.values())) / 4
    assert cache.find("acme/whole", "main", weights=True, file=name) is None
    repo.requests.clear()
    assert Source.open(f"acme/whole:{name}", weights=False).chat(message).token_ids == ids and repo.requests == []

    whole = Source.open(f"acme/whole:{name}")
    assert Path(whole.checkpoint.folder).read_bytes() == content[name] and whole.chat(message).token_ids == ids
    assert Source.open(f"acme/whole:{name}", weights=False).checkpoint.folder == whole.checkpoint.folder


def test_a_gguf_beside_which_weights_are_given_is_fetched_whole(repo, tmp_path: Path):
    from pixtral_cli.source import Source

    put_gguf(repo, tmp_path, "model.gguf", "unrelated.bin")
    opened = Source.open("acme/whole:model.gguf", [tmp_path / "pictures.gguf"]).checkpoint
    assert opened.folder.read_bytes() == repo.repos["acme/whole"]["model.gguf"]


def test_the_headers_of_a_gguf_in_parts_are_read_each_from_its_own(repo, tmp_path: Path, monkeypatch):
    content = gguf(tmp_path / "x.gguf", 50)
    other = content.replace(b"output.weight", b"outpux.weight")
    repo.repos["acme/parts"] = {"x-00001-of-00002.gguf": content, "x-00002-of-00002.gguf": other}
    monkeypatch.setattr("weights_cache.download.HEADER_BYTES", {".gguf": 2**12})
    assert fetch("acme/parts", weights=False, headers=True).stat().st_size == len(content)
    assert asked_bytes(repo) < len(content) / 4


def test_what_is_here_is_opened_itself(repo, tmp_path: Path):
    folder = fetch(REPO)
    repo.requests.clear()
    assert fetch_headers(REPO, tmp_path / "skeleton") == folder and fetch_headers(str(folder), tmp_path) == folder
    assert repo.requests == [] and not (tmp_path / "skeleton").exists()


@pytest.mark.parametrize(("status", "kind"), [(403, Gated), (429, DownloadFailed), (500, DownloadFailed)])
def test_a_server_that_refuses_the_headers_is_a_sentence(repo, tmp_path: Path, status: int, kind: type):
    from support import fake_hub

    repo.fault = lambda method, path: fake_hub.Fault(status=status) if path.endswith(".safetensors") else None
    with pytest.raises(kind):
        fetch_headers(REPO, tmp_path)


def test_a_file_that_ends_within_its_header_is_a_sentence(repo, tmp_path: Path):
    from support import fake_hub

    repo.fault = lambda method, path: fake_hub.Fault(cut=30) if path.endswith(".safetensors") else None
    with pytest.raises(DownloadFailed):
        fetch_headers(REPO, tmp_path)


def test_without_a_network_it_is_a_sentence(repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Offline):
        fetch_headers(REPO, tmp_path)
    assert repo.requests == []
