"""An opened model: what its errors advise depends on where it came from."""

import json
import os
import shutil

import pytest
from support.hub_cache import put

from pixtral_cli.errors import PixtralError
from pixtral_cli.source import Source
from pixtral_cli.tiny import FOLDER
from weights_cache.errors import WeightsError

QUESTION = [{"role": "user", "content": "hi"}]
FAULTS = {
    "config.json": lambda data: data["text_config"].update(vocab_size=-1),
    "generation_config.json": lambda data: data.update(eos_token_id=10**9),
    "tokenizer_config.json": lambda data: data.update(bos_token=3),
    "preprocessor_config.json": lambda data: data.update(image_mean="x"),
}
DAMAGED = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "tokenizer_config.json")


@pytest.fixture(params=["folder", "hub"])
def place(request, tmp_path, monkeypatch):
    """(where the files lie, by what name the model is opened, whether it was fetched)."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "own"))
    if request.param == "folder":
        folder = shutil.copytree(FOLDER, tmp_path / "model")
        return folder, str(folder), False
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.is_file()}
    root = put(tmp_path / "hub", "acme/model", files, linked=False)
    return next((root / "snapshots").iterdir()), "acme/model", True


def ask(name):
    source = Source.open(name)
    source.chat(QUESTION)
    return source.end_token_ids, source.checkpoint.tensors


def hint_of(name):
    with pytest.raises((PixtralError, WeightsError)) as refused:
        ask(name)
    return refused.value.hint


@pytest.mark.parametrize("file", FAULTS)
def test_to_fetch_again_is_advised_of_a_wrong_file_only_where_the_model_was_fetched(place, file):
    folder, name, fetched = place
    ask(name)
    data = json.loads((folder / file).read_text())
    FAULTS[file](data)
    (folder / file).write_text(json.dumps(data))
    assert ("--force-download" in hint_of(name)) == fetched


@pytest.mark.parametrize("file", DAMAGED)
def test_to_fetch_again_is_advised_of_a_damaged_file_only_where_the_model_was_fetched(place, file, monkeypatch):
    folder, name, fetched = place
    size = os.stat(folder / file).st_size
    (folder / file).write_bytes(b"\xff" * size)
    monkeypatch.setattr("weights_cache.cache.is_whole", lambda path: True)  # else it would be fetched anew
    assert ("--force-download" in hint_of(name)) == fetched


def test_a_broken_template_of_a_folder_is_not_to_be_fetched(place):
    folder, name, fetched = place
    (folder / "chat_template.jinja").write_text("{% for %}")
    assert ("--force-download" in hint_of(name)) == fetched


def test_a_serialized_model_with_a_broken_template_is_to_be_exported_again(place, tmp_path):
    folder, _, _ = place
    (folder / "chat_template.jinja").write_text("{% for %}")
    source = Source.open(folder)
    source.save(tmp_path / "file", source.placement(None))
    with pytest.raises(PixtralError) as refused:
        Source.open_serialized(tmp_path / "file").chat(QUESTION)
    assert refused.value.hint == "Export the model again, or use --raw (in Python: complete)."
