"""Promises of opening a folder. Oracles: transformers' own state and the safetensors package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weights_cache import checkpoint, weight_files
from weights_cache.errors import CheckpointCorrupt, FilesMismatch, PickleRefused, WeightsError, WeightsNotFound

WEIGHTS = {
    "model.embed_tokens.weight": torch.arange(6.0).view(3, 2),
    "model.norm.weight": torch.ones(2, dtype=torch.bfloat16),
    "lm_head.weight": torch.arange(6.0, 12.0).view(3, 2),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text model in one file."""
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path


def shard(folder: Path) -> Path:
    """Splits the folder's one file into two and an index; returns the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(weights)
    weight_map = {}
    for number, part in enumerate((names[:1], names[1:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def edit_index(index: Path, **changes: object) -> None:
    content = json.loads(index.read_text())
    content["weight_map"] |= changes
    index.write_text(json.dumps(content))


def failure(folder: Path, weight_paths: tuple[Path, ...] = ()) -> WeightsError:
    """The error of opening `folder` and asking for its tensors: one sentence."""
    with pytest.raises(WeightsError) as caught:
        checkpoint.open(folder, weight_paths).tensors  # noqa: B018
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return caught.value


def assert_holds(opened: checkpoint.Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert opened.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert opened.tensors[name].name == name
        assert (opened.tensors[name].shape, opened.tensors[name].nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert opened.tensor(name).equal(tensor)


OURS = {
    "language_model.embed_tokens.weight": WEIGHTS["model.embed_tokens.weight"],
    "language_model.norm.weight": WEIGHTS["model.norm.weight"],
    "lm_head.weight": WEIGHTS["lm_head.weight"],
}


@pytest.mark.parametrize("in_shards", [False, True])
def test_one_file_and_shards_hold_the_same_tensors(folder: Path, in_shards: bool):
    if in_shards:
        shard(folder)
    assert_holds(checkpoint.open(folder), OURS)


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("kind", ["pixtral", "mistral"])
def test_what_transformers_saves_opens_with_its_values(
    tmp_path: Path, kind: str, shard_size: str, original_format: bool
):
    from support import builders

    model = getattr(builders, kind)(tmp_path / "plain", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard_size, save_original_format=original_format)
    assert (shard_size == "20KB") == (tmp_path / "saved/model.safetensors.index.json").exists()

    opened = checkpoint.open(tmp_path / "saved")

    state = {in_our_words(name): tensor for name, tensor in model.state_dict().items()}
    assert_holds(opened, state)
    assert opened.config == json.loads((tmp_path / "saved/config.json").read_text())
    assert opened.generation_config == json.loads((tmp_path / "saved/generation_config.json").read_text())


def in_our_words(module_name: str) -> str:
    """transformers' module name (5.x) in our words, spelled apart from the tables under test."""
    elsewhere = ("language_model", "vision", "projector")
    if module_name.startswith("model.") and not any(part in module_name for part in elsewhere):
        return "language_model." + module_name[len("model.") :]
    return module_name.removeprefix("model.").replace("transformer.", "")


def test_headers_are_read_without_torch(folder: Path):
    code = (
        "import sys, pathlib; from weights_cache import checkpoint, hub; "
        f"opened = checkpoint.open(hub.fetch({str(folder)!r})); assert len(opened.tensors) == 3; "
        "print([m for m in ('torch', 'huggingface_hub', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]", done.stderr


def test_weight_paths_replace_the_folders_own(folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    save_file({"lm_head.weight": torch.zeros(3, 2)}, other / "head.safetensors")
    save_file({"model.norm.weight": torch.zeros(2)}, other / "norm.safetensors")
    expected = {"lm_head.weight": torch.zeros(3, 2), "language_model.norm.weight": torch.zeros(2)}

    assert_holds(checkpoint.open(folder, [other / "head.safetensors", other / "norm.safetensors"]), expected)
    assert_holds(checkpoint.open(folder, [other]), expected)


def test_side_files_are_found_or_none(folder: Path):
    (folder / "tokenizer.json").write_text("{}")
    opened = checkpoint.open(folder)
    assert opened.file("tokenizer.json") == folder / "tokenizer.json"
    assert opened.file("tekken.json") is None
    assert opened.generation_config == {}


def test_a_folder_without_weights_opens_and_says_so_when_they_are_asked_for(folder: Path):
    (folder / "model.safetensors").unlink()
    opened = checkpoint.open(folder)
    assert opened.config == {"model_type": "mistral"}
    with pytest.raises(WeightsNotFound, match=r"looked for model\.safetensors"):
        opened.tensor("lm_head.weight")


def test_a_folder_without_weights_says_which_its_form_has_and_what_to_do(tmp_path: Path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(WeightsNotFound, match=r"looked for consolidated\.safetensors") as caught:
        weight_files.in_folder(tmp_path, "native")
    assert caught.value.hint


def test_of_two_forms_in_one_folder_only_hugging_faces_is_read(folder: Path):
    save_file({"tok_embeddings.weight": torch.zeros(1)}, folder / "consolidated.safetensors")
    (folder / "params.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert_holds(checkpoint.open(folder), OURS)
    shard(folder)
    assert_holds(checkpoint.open(folder), OURS)


def test_a_folder_without_config_says_what_was_looked_for(folder: Path):
    (folder / "config.json").unlink()
    error = failure(folder)
    assert isinstance(error, WeightsNotFound) and "config.json" in str(error) and str(folder) in str(error)


def test_a_folder_that_does_not_exist_is_said_not_to_exist(tmp_path: Path):
    assert "does not exist" in str(failure(tmp_path / "nothing"))


@pytest.mark.parametrize("text", ["{", "[]", "\x00", '{"a": 1, "a": 2}'])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_json_file_that_is_none_is_damaged_and_named(folder: Path, name: str, text: str):
    shard(folder)
    (folder / name).write_text(text)
    error = failure(folder)
    assert isinstance(error, CheckpointCorrupt) and error.path == folder / name


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["config.json", "consolidated.safetensors"], WeightsNotFound),
        (["config.json", "consolidated-00001-of-00002.safetensors"], WeightsNotFound),
        (["mmproj-f16.gguf"], WeightsNotFound),
        (["pytorch_model.bin"], PickleRefused),
        (["config.json", "consolidated.00.pth"], PickleRefused),
        (["config.json", "model.pt"], PickleRefused),
        (["config.json", "adapter_model.safetensors"], WeightsNotFound),
        ([], WeightsNotFound),
    ],
)
def test_other_formats_are_refused_by_name_and_not_opened(tmp_path: Path, files: list[str], kind: type):
    for name in files:
        (tmp_path / name).write_bytes(b"{}" if name.endswith(".json") else b"garbage")
    assert type(failure(tmp_path)) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.bin", PickleRefused), ("a.pth", PickleRefused), ("a.txt", WeightsNotFound)],
)
def test_a_weight_path_of_another_format_is_refused(folder: Path, name: str, kind: type):
    (folder / name).write_bytes(b"garbage")
    assert type(failure(folder, (folder / name,))) is kind


def test_a_weight_path_that_does_not_exist_is_named(folder: Path):
    error = failure(folder, (folder / "absent.safetensors",))
    assert isinstance(error, WeightsNotFound) and "absent.safetensors" in str(error)


def test_native_tensors_in_a_renamed_file_are_known_by_their_names(folder: Path):
    save_file({"tok_embeddings.weight": torch.zeros(1)}, folder / "model.safetensors")
    error = failure(folder)
    assert isinstance(error, WeightsNotFound) and error.looked_for == "params.json"


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("missing", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_a_missing_shard_is_named_with_an_index_and_without(folder: Path, missing: str, indexed: bool):
    index = shard(folder)
    if not indexed:
        index.unlink()
    assert_holds(checkpoint.open(folder), OURS)
    (folder / missing).unlink()
    error = failure(folder)
    assert isinstance(error, CheckpointCorrupt) and missing in str(error)


def test_a_tensor_that_the_index_promises_and_the_shard_lacks_is_named(folder: Path):
    edit_index(shard(folder), **{"model.layers.0.mlp.up_proj.weight": "model-00002-of-00002.safetensors"})
    error = failure(folder)
    assert isinstance(error, CheckpointCorrupt) and error.path.name == "model-00002-of-00002.safetensors"
    assert "model.layers.0.mlp.up_proj.weight" in str(error)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 3, None])
def test_an_index_cannot_lead_out_of_its_folder(folder: Path, file: object):
    edit_index(shard(folder), **{"lm_head.weight": file})
    error = failure(folder)
    assert isinstance(error, CheckpointCorrupt) and "lm_head.weight" in str(error)


def test_the_same_tensor_under_two_names_is_refused(folder: Path):
    save_file(WEIGHTS | {"language_model.lm_head.weight": torch.zeros(1)}, folder / "model.safetensors")
    error = failure(folder)
    assert isinstance(error, CheckpointCorrupt) and "language_model.lm_head.weight" in str(error)


def test_a_truncated_file_is_refused_when_opened_not_when_used(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    error = failure(folder)
    assert isinstance(error, CheckpointCorrupt) and "cut short" in str(error)


# --- an index


def overlay(folder: Path) -> None:
    """An older copy of the head in the first shard; the index sends it to the second."""
    index = shard(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    save_file(WEIGHTS | {"lm_head.weight": torch.zeros(3, 2)}, first)
    save_file({"lm_head.weight": WEIGHTS["lm_head.weight"]}, second)
    edit_index(index, **dict.fromkeys(WEIGHTS, first.name) | {"lm_head.weight": second.name})


def test_of_copies_in_two_shards_the_one_that_the_index_names_counts(folder: Path):
    overlay(folder)
    assert_holds(checkpoint.open(folder), OURS)


def test_the_index_decides_as_in_transformers(tmp_path: Path):
    from support import builders
    from transformers import MistralForCausalLM

    model = builders.mistral(tmp_path, num_hidden_layers=1)
    shard(tmp_path)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second, metadata={"format": "pt"})
    save_file({name: torch.zeros_like(load_file(first)[name])}, first, metadata={"format": "pt"})
    edit_index(tmp_path / "model.safetensors.index.json", **{name: second.name})
    theirs = MistralForCausalLM.from_pretrained(tmp_path).state_dict()
    assert theirs[name].equal(model.state_dict()[name])
    assert checkpoint.open(tmp_path).tensor(in_our_words(name)).equal(theirs[name])


def test_without_an_index_two_copies_are_still_refused(folder: Path):
    overlay(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert isinstance(failure(folder), FilesMismatch)


def test_a_tensor_that_the_index_forgets_is_read_all_the_same(folder: Path):
    index = shard(folder)
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    assert_holds(checkpoint.open(folder), OURS)


def test_a_whole_file_beside_an_index_is_read_and_said(folder: Path):
    whole = (folder / "model.safetensors").read_bytes()
    shard(folder)
    assert checkpoint.open(folder).note is None
    (folder / "model.safetensors").write_bytes(whole)
    opened = checkpoint.open(folder)
    assert "model.safetensors is read" in opened.note and "index" in opened.note
    assert {info.file.name for info in opened.tensors.values()} == {"model.safetensors"}
    assert checkpoint.open(folder, [folder / "model.safetensors"]).note is None


# --- a byte order mark


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
def test_a_byte_order_mark_is_passed_over(folder: Path, name: str):
    shard(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    opened = checkpoint.open(folder)
    assert_holds(opened, OURS)
    assert (opened.config, opened.generation_config) == ({"model_type": "mistral"}, {"eos_token_id": 2})
