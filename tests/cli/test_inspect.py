"""`pixtral inspect`: what is told of a model agrees with the model when it is loaded; no weights, no torch."""

import json
import os

import pytest
from support import builders, fp8_builders
from support.processes import imported_by

from pixtral_cli.encoding_choices import CHOICES
from pixtral_cli.model import free_memory, memory
from pixtral_cli.model.free_memory import Device
from pixtral_cli.tiny import FOLDER

GIB = 2**30


def told(call, *arguments):
    code, out, err = call("inspect", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_the_facts_are_those_of_the_loaded_model(call):
    import torch

    from pixtral_cli.model import save
    from pixtral_cli.model.load import check_names, empty, load
    from pixtral_cli.source import Source

    found, source = told(call, "tiny"), Source.open("tiny")
    model = load(source.checkpoint, source.config, source.placement(None), torch.device("cpu"))
    sizes = {name: save.loaded(model, name).numel() for name in check_names(empty(source.config), source.checkpoint)}
    vision = sum(size for name, size in sizes.items() if name.startswith(("vision_tower", "multi_modal_projector")))
    assert found["parameters"] == sum(sizes.values()) and found["vision"]["parameters"] == vision
    assert found["format"] == "hf" and found["architecture"] == "LlavaForConditionalGeneration"
    config = json.loads((FOLDER / "config.json").read_text())
    assert found["context"] == config["text_config"]["max_position_embeddings"]
    assert found["vision"]["patch_size"] == config["vision_config"]["patch_size"]
    assert found["bytes_on_disk"] == sum(path.stat().st_size for path in FOLDER.glob("*.safetensors"))


def test_a_context_that_positions_are_scaled_for_says_from_where(call, tmp_path):
    rope = {**builders.YARN, "original_max_position_embeddings": 16384}
    builders.ministral3(tmp_path, rope, max_position_embeddings=262144)
    found = told(call, str(tmp_path))
    assert (found["context"], found["original_context"]) == (262144, 16384)
    assert [row["tokens"] for row in found["encodings"][0]["lengths"]][-1] == 262144
    assert "context:      262144 tokens, beyond 16384 by YaRN\n" in call("inspect", str(tmp_path))[1]
    assert told(call, "tiny")["original_context"] is None


@pytest.mark.parametrize("encoding", ["bfloat16", "float32", "q4_k"])
def test_the_bytes_of_the_weights_are_those_of_an_exported_file(call, tmp_path, encoding):
    from safetensors import safe_open

    file = tmp_path / "model"
    assert call("export", "tiny", str(file), "--quantization-encoding", encoding)[0] == 0
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if not name.startswith("file/") and name != "seal"]
        stored = sum(opened.get_tensor(name).nbytes for name in names)
    by_name = {each["name"]: each["weights_bytes"] for each in told(call, "tiny")["encodings"]}
    assert by_name[encoding] == stored and list(by_name) == ["bfloat16", *(n for n in CHOICES if n != "bfloat16")]
    saved = told(call, str(file))
    assert saved["format"] == "serialized" and [each["name"] for each in saved["encodings"]] == [encoding]


def test_of_a_serialized_model_that_is_new_here_the_small_files_are_checked_and_no_weights(call, tmp_path, monkeypatch):
    from weights_cache.formats.serialized import SerializedFile

    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "cache"))
    file, checked, original = tmp_path / "model", [], SerializedFile._hash
    assert call("export", "tiny", str(file))[0] == 0
    monkeypatch.setattr(SerializedFile, "_hash", lambda self, name: checked.append(name) or original(self, name))
    os.utime(file)
    assert told(call, str(file))["format"] == "serialized"
    assert "file/config.json" in checked and all(name.startswith("file/") for name in checked)
    assert call("run", "--serialized-model-path", str(file), "-p", "hi", "--max-new-tokens", "1")[0] == 0
    assert not all(name.startswith("file/") for name in checked)  # looking at it has not vouched for its weights
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"vocab_size"', b'"vocab_sizf"'))
    code, _, err = call("inspect", str(file))
    assert code == 1 and "config.json" in err


def test_the_cache_is_as_large_as_the_one_that_is_made(call):
    import torch

    from pixtral_cli.model.kv_cache import KVCache, pages_for
    from pixtral_cli.source import Source

    text = Source.open("tiny").config.text
    for each in told(call, "tiny")["encodings"][0]["lengths"]:
        cache = KVCache(text, torch.bfloat16, torch.device("cpu"), pages_for(each["tokens"]))
        assert each["kv_cache_bytes"] == cache._store.nbytes


def test_keys_and_values_in_fp8_take_a_byte_a_number_and_one_for_their_scale(call):
    from pixtral_cli.source import Source

    text = Source.open("tiny").config.text
    wide, narrow = (
        told(call, "tiny", *flags)["encodings"][0]["lengths"] for flags in ((), ("--kv-cache-dtype", "fp8"))
    )
    for before, now in zip(wide, narrow, strict=True):
        assert now["kv_cache_bytes"] * 2 * text.head_dim == before["kv_cache_bytes"] * (text.head_dim + 1)
        assert before["total_bytes"] - now["total_bytes"] == before["kv_cache_bytes"] - now["kv_cache_bytes"]


@pytest.mark.parametrize("command", ["run", "serve", "inspect"])
def test_a_way_to_keep_keys_and_values_that_is_not_known_is_refused_with_those_that_are(call, command):
    code, _, err = call(command, *(["tiny"] if command == "inspect" else []), "--kv-cache-dtype", "fp4")
    assert code == 2 and "'fp4'" in err and "auto, fp8" in err


def test_what_is_free_decides_what_fits_on_each_device(call, monkeypatch):
    monkeypatch.setattr(
        free_memory, "devices", lambda: [Device("cpu", 300 * 2**20), Device("gpu-0", 4 * GIB), Device("x", None)]
    )
    for encoding in told(call, "tiny")["encodings"]:
        for row in encoding["lengths"]:
            total = encoding["weights_bytes"] + row["kv_cache_bytes"] + memory.WORKSPACE
            assert row["total_bytes"] == total
            assert row["fits"] == {"cpu": total <= 300 * 2**20, "gpu-0": True, "x": None}
            needed = row["needed_bytes"]
            assert needed["gpu-0"] > memory.CONTEXT + total - memory.WORKSPACE and needed["x"] == needed["cpu"] >= total
    text = call("inspect", "tiny")[1]
    assert "does not fit" in text and "cpu: 300.0 MiB free" in text and "nobody says" in text


def test_gpus_are_asked_of_their_driver_and_a_broken_one_is_none(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for script, expected in (
        ("echo '0, 1000'; echo '1, 2000'", [("gpu-0", 1000 * 2**20), ("gpu-1", 2000 * 2**20)]),
        ("echo '0, [N/A]'", []),
        ("exit 9", []),
    ):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert [(device.name, device.free) for device in free_memory.devices()[1:]] == expected


def test_a_gguf_and_its_own_mixture_are_looked_at(call, tmp_path):
    from gguf import GGMLQuantizationType as Kind
    from support import format_builders

    path = tmp_path / "tiny.gguf"
    format_builders.gguf_text(FOLDER, path, lambda name: Kind.Q8_0)
    found = told(call, str(path))
    assert found["format"] == "gguf" and found["vision"] is None
    assert found["encodings"][0]["name"] == "q8_0" and found["encodings"][0]["weights_bytes"] < path.stat().st_size


def test_neither_torch_nor_anything_that_reads_weights_is_imported():
    """But for a GPU, of which only torch knows whether its kernels work there."""
    assert set(imported_by("inspect", "tiny", CUDA_VISIBLE_DEVICES="")) <= {"tokenizers"}


@pytest.mark.parametrize("name", ["no/such/model/here", "./nothing", "a/not-cached"])
def test_a_model_that_is_not_here_is_a_sentence(refused, name):
    assert name in refused("inspect", name)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float8_e5m2"])
@pytest.mark.parametrize("command", [["inspect"], ["run", "-p", "hi", "--model-path"]])
def test_weights_of_a_type_that_is_none_of_weights_are_a_sentence(refused, tmp_path, command, dtype):
    import torch

    def change(tensors):
        name = next(name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight"))
        tensors[name] = torch.ones(tensors[name].shape).to(getattr(torch, dtype))

    builders.mistral(tmp_path)
    builders.add_processor(tmp_path)
    fp8_builders.edit(tmp_path, change)
    assert "q_proj.weight is of" in refused(*command, str(tmp_path), code=1)


def test_a_text_of_every_fact_and_a_table(call):
    lines = call("inspect", "tiny")[1].splitlines()
    heads = [line.split(":")[0] for line in lines[:7]]
    assert heads == ["model", "architecture", "parameters", "context", "pictures", "format", "on disk"]
    assert any(line.startswith("q4_k") for line in lines) and max(map(len, lines)) <= 100
