"""`pixtral cache` and `pixtral download`: what lies in the caches is told, checked and removed, and nothing else is."""

import json
import os
import time
from pathlib import Path

import pytest
from support.hub_cache import COMMIT, DAYS, HF, put, weights
from support.processes import imported_by

from weights_cache import inventory


def listed(call):
    code, out, err = call("cache", "list", "--json")
    assert code == 0 and err == ""
    return {model["name"]: model for model in json.loads(out)["models"]}


def test_the_list_has_name_format_encoding_size_and_last_use(caches, call):
    put(caches, "a/hf", HF | {"model.safetensors": weights()}, used_days_ago=3)
    put(caches, "a/native", {"params.json": b"{}", "consolidated.safetensors": weights("float32")}, linked=False)
    put(caches, "a/branch", HF | {"model.safetensors": weights()}, ref="v2")
    found = listed(call)
    assert {(n, m["format"], m["encoding"]) for n, m in found.items()} == {
        ("a/hf", "hf", "bfloat16"), ("a/native", "native", "float32"), ("a/branch@v2", "hf", "bfloat16")
    }  # fmt: skip
    assert found["a/hf"]["bytes"] == len(weights()) + sum(map(len, HF.values()))
    assert abs(time.time() - 3 * DAYS - found["a/hf"]["last_used"]) < 60
    _, out, _ = call("cache", "list")
    lines = out.splitlines()
    assert lines[0].split() == ["NAME", "FORMAT", "ENCODING", "SIZE", "LAST", "USED"]
    assert any(line.startswith("a/hf ") and "KiB" in line and line.endswith("3 days ago") for line in lines)
    assert lines[-1].startswith("3 models, ")


def test_sizes_agree_with_the_hubs_own_library(caches, call):
    from huggingface_hub import scan_cache_dir

    put(caches, "a/hf", HF | {"model.safetensors": weights()})
    put(caches, "a/two", HF | {"model.safetensors": weights()}, linked=False)
    theirs = {repo.repo_id: repo.size_on_disk for repo in scan_cache_dir(caches).repos}
    content = len(weights()) + sum(map(len, HF.values()))
    assert {name: model["bytes"] for name, model in listed(call).items()} == dict.fromkeys(theirs, content)
    assert theirs["a/two"] == content


def gguf(path: Path, kind) -> bytes:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    data = gguf.quants.quantize(np.ones((4, 256), np.float32), kind)
    writer.add_tensor("output.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def ggufs(caches, tmp_path):
    """A repository with two GGUF models that share a picture part."""
    from gguf import GGMLQuantizationType as Kind

    files = {name: gguf(tmp_path / name, kind) for name, kind in (("a.gguf", Kind.Q4_0), ("b.gguf", Kind.Q8_0))}
    return put(caches, "g/all", files | {"mmproj.gguf": gguf(tmp_path / "m.gguf", Kind.F16)})


def test_each_gguf_is_a_model_of_its_own_and_is_removed_without_what_the_other_needs(ggufs, call):
    found = listed(call)
    assert {name: model["encoding"] for name, model in found.items()} == {
        "g/all:a.gguf": "q4_0",
        "g/all:b.gguf": "q8_0",
    }
    assert call("cache", "remove", "g/all:a.gguf", "--yes")[0] == 0
    assert set(listed(call)) == {"g/all:b.gguf"}
    snapshot = ggufs / "snapshots" / COMMIT
    assert sorted(path.name for path in snapshot.iterdir()) == ["b.gguf", "mmproj.gguf"]
    assert len(list((ggufs / "blobs").iterdir())) == 2
    assert call("cache", "remove", "g/all:b.gguf", "--yes")[0] == 0
    assert not ggufs.exists()


@pytest.mark.parametrize("linked", [True, False])
def test_a_removed_model_is_gone_with_its_folder_and_others_stay(caches, call, linked):
    gone = put(caches, "a/gone", HF | {"model.safetensors": weights()}, linked=linked)
    put(caches, "a/stays", HF | {"model.safetensors": weights()})
    (caches / "version.txt").write_text("1")
    code, out, _ = call("cache", "remove", "a/gone", "--yes")
    assert code == 0 and out.startswith("removed a/gone (hf, ")
    assert not gone.exists() and set(listed(call)) == {"a/stays"} and (caches / "version.txt").exists()


def test_a_content_that_two_revisions_share_stays_for_the_other(caches, call):
    put(caches, "a/m", HF | {"model.safetensors": weights()})
    root = put(caches, "a/m", HF | {"model.safetensors": weights(), "tokenizer.json": b"new"}, "d" * 40, ref="v2")
    assert call("cache", "remove", "a/m@v2", "--yes")[0] == 0
    assert set(listed(call)) == {"a/m"} and len(list((root / "blobs").iterdir())) == 3
    assert [path.name for path in (root / "refs").iterdir()] == ["main"]
    assert call("cache", "verify", "a/m")[0] == 0


def test_nothing_outside_the_caches_is_removed_whatever_links_say(caches, call, refused, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "model.safetensors").write_bytes(weights())
    root = put(caches, "a/odd", HF)
    (root / "snapshots" / COMMIT / "model.safetensors").symlink_to(precious / "model.safetensors")
    (caches / "models--a--linked").symlink_to(precious)
    assert set(listed(call)) == {"a/odd"}
    assert call("cache", "remove", "a/odd", "--yes")[0] == 0
    assert not root.exists() and (precious / "model.safetensors").read_bytes() == weights()
    assert "precious" in refused("cache", "remove", "../precious", "--yes")


def test_what_a_download_left_half_is_listed_as_incomplete_and_can_be_removed(caches, call):
    root = put(caches, "a/half", HF)
    (root / "blobs" / f"{'0' * 64}.pixtral.incomplete").write_bytes(b"x" * 5000)
    assert listed(call)["a/half"]["format"] == "incomplete" and listed(call)["a/half"]["bytes"] == 5000
    assert call("cache", "remove", "a/half", "--yes")[0] == 0 and not root.exists()


def test_a_whole_model_whose_new_download_broke_off_is_listed_with_what_that_left(caches, call):
    root = put(caches, "a/m", HF | {"model.safetensors": weights()})
    blob = (root / "snapshots" / COMMIT / "model.safetensors").resolve()
    blob.with_name(f"{blob.name}.pixtral.incomplete").write_bytes(b"x" * 5000)
    models = json.loads(call("cache", "list", "--json")[1])["models"]
    assert {(each["format"], each["bytes"]) for each in models} >= {("incomplete", 5000)} and len(models) == 2
    assert call("cache", "prune", "--older-than", "0h", "--yes")[0] == 0
    assert blob.exists() and len(json.loads(call("cache", "list", "--json")[1])["models"]) == 1


def test_what_a_download_has_fetched_and_not_yet_linked_stays_and_old_debris_goes(caches, call):
    root = put(caches, "a/m", HF | {"model.safetensors": weights()})
    fresh, old = (root / "blobs" / (letter * 64) for letter in "ab")
    for blob in (fresh, old):
        blob.write_bytes(b"x" * 5000)
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    assert call("cache", "remove", "a/m", "--yes")[0] == 0
    assert list((root / "blobs").iterdir()) == [fresh]


def test_a_model_that_lacks_a_shard_is_incomplete(caches, call):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), "model-00001-of-00002.safetensors": weights()}
    root = put(caches, "a/m", HF | files)
    assert listed(call)["a/m"]["format"] == "incomplete"
    assert call("cache", "remove", "a/m", "--yes")[0] == 0 and not root.exists()


def test_verify_finds_one_altered_byte_in_any_file(caches, call):
    root = put(caches, "a/m", HF | {"model.safetensors": weights()})
    put(caches, "a/plain", HF | {"model.safetensors": weights()}, linked=False)
    assert call("cache", "verify")[:2] == (0, "a/m: whole\na/plain: whole\n")
    for name in ("model.safetensors", "tokenizer.json"):
        blob = (root / "snapshots" / COMMIT / name).resolve()
        good = blob.read_bytes()
        blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        code, out, err = call("cache", "verify", "a/m")
        assert code == 1 and out == f"a/m: damaged: {name}\n" and "a/m" in err and "cache remove a/m" in err
        blob.write_bytes(good)


def test_prune_removes_what_pixtral_used_long_ago_and_nothing_else(caches, call):
    old = put(caches, "a/old", HF | {"model.safetensors": weights()}, used_days_ago=40)
    put(caches, "a/new", HF | {"model.safetensors": weights()}, used_days_ago=5)
    others = put(caches, "b/others", HF | {"model.safetensors": weights()})
    for path in (others / "blobs").iterdir():
        os.utime(path, (1, 1))
    code, out, _ = call("cache", "prune", "--older-than", "30d", "--yes", "--json")
    assert code == 0 and json.loads(out)["removed"] == ["a/old"] and not old.exists()
    assert set(listed(call)) == {"a/new", "b/others"}
    assert call("cache", "prune", "--older-than", "30d", "--yes")[1] == ""


@pytest.mark.parametrize("command", [["remove", "a/m"], ["prune", "--older-than", "1h"]])
def test_without_a_terminal_and_without_yes_nothing_is_removed(caches, program, command):
    root = put(caches, "a/m", HF | {"model.safetensors": weights()}, used_days_ago=9)
    own = {"PIXTRAL_CACHE": os.environ["PIXTRAL_CACHE"]}
    done = program("cache", *command, input=b"y\n", env=own)
    assert done.returncode == 2 and b"--yes" in done.stderr and root.exists()


@pytest.mark.parametrize(("answer", "stays"), [("y\n", False), ("n\n", True), ("\n", True), ("", True)])
def test_a_person_is_asked_and_only_yes_removes(caches, call, monkeypatch, answer, stays):
    import io
    import sys

    root = put(caches, "a/m", HF | {"model.safetensors": weights()})
    asked = io.StringIO(answer)
    asked.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", asked)
    code, _, err = call("cache", "remove", "a/m")
    assert "Remove 1 model?" in err and "a/m" in err and root.exists() == stays and code == int(stays)


def test_files_of_our_own_are_listed_and_removed(caches, call, tmp_path):
    code, _, err = call("export", "tiny", str(tmp_path / "own/models/tiny.q8"), "--quantization-encoding", "bfloat16")
    assert code == 0, err
    assert listed(call)["tiny.q8"]["format"] == "serialized" and listed(call)["tiny.q8"]["encoding"] == "bfloat16"
    assert call("cache", "verify")[:2] == (0, "tiny.q8: whole\n")
    assert call("cache", "remove", "tiny.q8", "--yes")[0] == 0 and listed(call) == {}


@pytest.fixture
def exported(caches, call, tmp_path):
    """A serialized model in a folder of the user's."""
    file = tmp_path / "my models" / "größe \u00e9.q4"
    assert call("export", "tiny", str(file), "--quantization-encoding", "bfloat16")[0] == 0
    return file


def test_an_export_is_listed_wherever_it_lies_and_forgotten_when_it_is_gone(exported, call):
    path, size = str(exported), exported.stat().st_size
    found = listed(call)[path]
    assert time.time() - found.pop("last_used") < 60
    wanted = {"format": "serialized", "encoding": "bfloat16", "bytes": size, "path": path, "name": path}
    assert found == wanted and path in call("cache", "list")[1]
    again = exported.with_name("again")
    assert call("export", "tiny", str(again))[0] == 0 and set(listed(call)) == {path, str(again)}
    exported.unlink()
    assert set(listed(call)) == {str(again)}
    again.rename(again.with_name("elsewhere"))
    assert listed(call) == {} and not [*Path(os.environ["PIXTRAL_CACHE"]).glob("stamps/*")]


def test_an_export_that_is_loaded_was_used_then(exported, call):
    stamps = [*Path(os.environ["PIXTRAL_CACHE"]).glob("stamps/*")]
    for path in [exported, *stamps]:
        os.utime(path, (1e9, exported.stat().st_mtime if path == exported else 1e9))
    assert listed(call)[str(exported)]["last_used"] == 1e9 and len(stamps) == 1
    assert call("run", "--serialized-model-path", str(exported), "-p", "hi", "--max-new-tokens", "1")[0] == 0
    assert time.time() - listed(call)[str(exported)]["last_used"] < 60


def checked(model):
    """The steps of comparing a whole model with its hashes."""
    steps = []
    assert inventory.altered(model, lambda *step: steps.append(step)) == []
    return steps


def test_progress_is_told_inside_large_files_of_every_form(exported, caches, monkeypatch):
    put(caches, "a/hf", HF | {"model.safetensors": weights()})
    monkeypatch.setattr("weights_cache.cache.CHUNK", 1000)
    for model in inventory.models():
        steps = checked(model)
        done = [step[1] for step in steps]
        assert {step[0] for step in steps} == {f"checking {model.name}"} and done == sorted(done)
        assert len(set(done)) > len(model.files) and done[-1] == steps[-1][2]


def test_an_altered_or_overwritten_export_is_found_by_verify(exported, call):
    assert call("cache", "verify")[:2] == (0, f"{exported}: whole\n")
    content = exported.read_bytes()
    for damaged in (content[:-1] + b"x", content[:1000], b"a letter"):
        exported.write_bytes(damaged)
        code, out, err = call("cache", "verify")
        assert code == 1 and out.startswith(f"{exported}: damaged") and f"'{exported}'" in err


def test_an_export_goes_only_when_it_is_named_by_its_path(exported, call, monkeypatch):
    assert call("cache", "prune", "--older-than", "0h", "--yes")[0] == 0 and exported.exists()
    assert call("cache", "remove", exported.name, "--yes")[0] == 1 and exported.exists()
    assert call("cache", "remove", str(exported))[0] == 2 and exported.exists()
    monkeypatch.chdir(exported.parent)
    assert call("cache", "remove", exported.name, "--yes")[0] == 0 and not exported.exists()
    assert listed(call) == {} and exported.parent.exists()


def test_no_other_file_is_removed_by_its_path(caches, refused, tmp_path):
    (tmp_path / "letter").write_text("dear")
    err = refused("cache", "remove", str(tmp_path / "letter"), "--yes")
    assert "letter" in err and (tmp_path / "letter").exists()


def test_the_folders_are_the_hubs_and_ours(caches, call, tmp_path):
    assert call("cache", "path")[1].splitlines() == [str(caches), str(tmp_path / "own")]
    assert json.loads(call("cache", "path", "--json")[1]) == {"hub": str(caches), "own": str(tmp_path / "own")}


def test_an_empty_cache_is_no_error(caches, call):
    assert call("cache", "list")[:2] == (0, "") and listed(call) == {}


@pytest.mark.parametrize("arguments", [["list"], ["path"], ["verify"], ["--help"]])
def test_nothing_heavy_is_imported_even_for_models_of_every_form(caches, exported, ggufs, arguments):
    put(caches, "a/hf", HF | {"model.safetensors": weights()})
    environment = {name: os.environ[name] for name in ("HF_HOME", "PIXTRAL_CACHE")}
    assert imported_by("cache", *arguments, **environment) == []


@pytest.mark.parametrize("age", ["", "x", "3x", "-1d", "1.5d"])
def test_an_age_that_is_none_is_a_usage_error(refused, age):
    assert "--older-than" in refused("cache", "prune", "--older-than", age, code=2)


def test_a_serialized_file_that_goes_while_the_models_are_listed_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(inventory, "serialized_files", lambda: {tmp_path / "gone": "gone"})
    assert "gone" not in [model.name for model in inventory.models()]
