"""What `git clone` leaves without Git LFS: every file that is read is known as a pointer, and what to run is said."""

import json
import shutil
from pathlib import Path

import pytest

from pixtral_cli.source import Source
from pixtral_cli.tiny import FOLDER
from weights_cache import checkpoint
from weights_cache.errors import CheckpointCorrupt, LfsPointer
from weights_cache.formats import serialized

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 14571400\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(FOLDER, tmp_path / "model")


def assert_told(path: Path, read) -> None:
    path.write_text(POINTER)
    with pytest.raises(LfsPointer) as refused:
        read()
    assert str(path) in str(refused.value) and "damaged" not in str(refused.value)
    assert refused.value.hint == f"Run `git lfs pull` in {path.parent}."


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_pointer_in_the_place_of_a_models_file_is_named(folder: Path, name: str):
    def read() -> None:
        source = Source.open(folder)
        _ = source.processor, source.checkpoint.generation_config, source.checkpoint.tensors

    read()
    assert_told(folder / name, read)


def test_a_pointer_in_the_place_of_a_tokenizer_is_named_before_anything_else_is_read(folder: Path):
    assert_told(folder / "tokenizer.json", lambda: checkpoint.open(folder))


@pytest.mark.parametrize("name", ["chat_template.jinja", "preprocessor_config.json", "tokenizer_config.json"])
def test_a_pointer_in_the_place_of_a_side_file_is_named(folder: Path, name: str):
    assert (folder / name).is_file()
    assert_told(folder / name, lambda: Source.open(folder).processor)


def test_a_pointer_in_the_place_of_an_index_or_a_shard_is_named(folder: Path):
    shard = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    tensors = checkpoint.Checkpoint(folder, {}, [shard])._stored.values()
    weight_map = {stored.name: shard.name for stored in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert checkpoint.open(folder).tensors
    assert_told(shard, lambda: checkpoint.open(folder).tensors)
    assert_told(index, lambda: checkpoint.open(folder).tensors)


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors", "model", "model.bin"])
def test_a_pointer_that_was_named_itself_is_known_under_every_name(tmp_path: Path, name: str):
    assert_told(tmp_path / name, lambda: checkpoint.open(tmp_path / name))
    assert_told(tmp_path / name, lambda: checkpoint.open(FOLDER, [tmp_path / name]).tensors)


def test_a_pointer_in_the_place_of_a_gguf_in_a_folder_or_of_a_serialized_model_is_named(tmp_path: Path):
    assert_told(tmp_path / "model.gguf", lambda: checkpoint.open(tmp_path))
    assert_told(tmp_path / "model.pixtral", lambda: serialized.SerializedFile(tmp_path / "model.pixtral"))


def test_a_damaged_file_is_still_called_damaged(folder: Path):
    (folder / "model.safetensors").write_text(POINTER[8:])
    with pytest.raises(CheckpointCorrupt, match="damaged") as refused:
        _ = checkpoint.open(folder).tensors
    assert not isinstance(refused.value, LfsPointer)
