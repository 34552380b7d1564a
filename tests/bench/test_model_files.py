"""Random weights are sane, and what each program reads is the same weights: by gguf-py and safetensors themselves."""

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.format_builders import interleaved
from transformers import Mistral3ForConditionalGeneration

from pixtral_cli.bench import gguf_writer, hf_writer, model_files, random_weights, shapes
from pixtral_cli.errors import ModelError
from pixtral_cli.model.families import read_config
from pixtral_cli.source import Source
from pixtral_cli.tiny import FOLDER
from weights_cache import checkpoint, packed

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
ROTARY = {"q": 4, "k": 2}


@pytest.fixture
def small(tmp_path):
    """A serialized model of random weights in an encoding, opened."""

    def make(encoding):
        path = tmp_path / f"small.{encoding}"
        random_weights.write(shapes.config_of("1b") | SMALL, encoding, path)
        return Source.open_serialized(path)

    return make


@pytest.mark.parametrize("encoding", shapes.ENCODINGS)
def test_random_weights_are_as_large_as_a_trained_models_and_always_the_same(small, encoding):
    source = small(encoding)
    opened = source.checkpoint
    for name, info in opened.tensors.items():
        weight = packed.plain(opened.weight(name)).float()
        if weight.ndim == 2:
            assert 0.008 < weight.std() < 0.05 and weight.abs().max() < 1, (name, info.encoding)
            assert abs(weight.mean()) < 0.01, name
        else:
            assert (weight == 1).all()
    again = random_weights.random_weight(opened.tensors["lm_head.weight"])
    first = opened.weight("lm_head.weight")
    assert torch.equal(packed.plain(again), packed.plain(first))
    assert source.placement(None).label == encoding


def test_every_shape_has_the_sizes_of_its_name():
    sizes = {}
    for shape in shapes.SHAPES:
        raw = shapes.config_of(shape)
        tensors = random_weights.RandomCheckpoint(raw, read_config(raw), "q4_k").tensors
        sizes[shape] = sum(np.prod(info.shape) for info in tensors.values()) / 1e9
    assert sizes == pytest.approx(
        {"1b": 1.54, "3b": 3.43, "8b": 8.02, "nemo-12b": 12.25, "ministral-3b": 3.43, "small-24b": 23.57}, abs=0.01
    )


@pytest.mark.parametrize("encoding", [name for name in shapes.ENCODINGS if name not in ("nf4", "fp8")])
def test_llama_cpp_gets_the_very_bytes(small, tmp_path, encoding):
    source = small(encoding)
    path = tmp_path / "model.gguf"
    gguf_writer.write(source.checkpoint, source.config, path)
    names = {"embed_tokens": "token_embd", "lm_head": "output", "up_proj": "ffn_up", "v_proj": "attn_v"}
    ours = {theirs: name for name in source.checkpoint.tensors for part, theirs in names.items() if part in name}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(found) == len(source.checkpoint.tensors)
    for name, theirs in (("token_embd.weight", "token_embd"), ("output.weight", "output")):
        assert bytes(found[name].data) == _bytes(source.checkpoint.weight(ours[theirs]))
    for part, heads in ROTARY.items():
        weight = source.checkpoint.weight(f"language_model.layers.1.self_attn.{part}_proj.weight")
        rows = weight.view(torch.uint8) if isinstance(weight, torch.Tensor) else weight.rows
        assert bytes(found[f"blk.1.attn_{part}.weight"].data) == _bytes(interleaved(rows, heads))


def _bytes(weight):
    rows = weight if isinstance(weight, torch.Tensor) else weight.rows
    return rows.contiguous().view(torch.uint8).numpy().tobytes()


def test_both_parts_of_a_model_that_sees_read_back_as_the_same_weights(tmp_path):
    source = Source.open("tiny")
    gguf_writer.write(source.checkpoint, source.config, tmp_path / "model.gguf")
    gguf_writer.write_pictures(source.checkpoint, source.config, tmp_path / "mmproj.gguf")
    back = checkpoint.open(tmp_path / "model.gguf", [tmp_path / "mmproj.gguf"])
    assert back.tensors.keys() == source.checkpoint.tensors.keys()
    for name in back.tensors:
        assert torch.equal(back.tensor(name).float(), source.checkpoint.tensor(name).float()), name


def test_a_model_that_merges_patches_reads_back_as_the_same_weights_in_both_forms(tmp_path):
    raw = shapes.config_of("small-24b", sees=True)
    raw["text_config"] = raw["text_config"] | SMALL
    raw["vision_config"] = raw["vision_config"] | {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 32}
    random_weights.write(raw, "bfloat16", tmp_path / "small")
    source = Source.open_serialized(tmp_path / "small")
    gguf_writer.write(source.checkpoint, source.config, tmp_path / "model.gguf")
    gguf_writer.write_pictures(source.checkpoint, source.config, tmp_path / "mmproj.gguf")
    hf_writer.write(source.checkpoint, "bfloat16", tmp_path / "folder")
    gguf_form = checkpoint.open(tmp_path / "model.gguf", [tmp_path / "mmproj.gguf"])
    for back in (gguf_form, checkpoint.open(tmp_path / "folder")):
        assert read_config(back.config).image_layout == source.config.image_layout
        assert back.tensors.keys() == source.checkpoint.tensors.keys()
        for name in back.tensors:
            assert torch.equal(back.tensor(name).float(), source.checkpoint.tensor(name).float()), name
    loaded, report = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    merger = "multi_modal_projector.patch_merger.merging_layer.weight"
    assert loaded.get_parameter(f"model.{merger}").equal(source.checkpoint.tensor(merger))


@pytest.mark.parametrize("attention", [{"mscale_all_dim": 1.0}, {"mscale_all_dim": 0}])
@pytest.mark.parametrize("beta", [0, 0.1])
def test_llama_cpp_is_told_how_positions_and_queries_are_scaled(tmp_path, attention, beta):
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16, "original_max_position_embeddings": 16384}
    rope |= {"mscale": 1.0, "llama_4_scaling_beta": beta, **attention}
    raw = {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "rope_parameters": rope, **SMALL}
    random_weights.write(raw, "q4_k", tmp_path / "small")
    source = Source.open_serialized(tmp_path / "small")
    gguf_writer.write(source.checkpoint, source.config, tmp_path / "model.gguf")
    assert read_config(checkpoint.open(tmp_path / "model.gguf").config).text == source.config.text


def test_what_ggml_does_not_have_is_refused(small, tmp_path):
    source = small("nf4")
    with pytest.raises(ModelError, match="no nf4"):
        gguf_writer.write(source.checkpoint, source.config, tmp_path / "model.gguf")


def test_transformers_gets_a_folder_like_its_own(tmp_path):
    hf_writer.write(Source.open("tiny").checkpoint, "bfloat16", tmp_path / "folder")
    found = {k: v for file in (tmp_path / "folder").glob("*.safetensors") for k, v in load_file(file).items()}
    expected = load_file(FOLDER / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)


def test_bitsandbytes_gets_the_very_codes_and_scales(small, tmp_path):
    from bitsandbytes.functional import QuantState, dequantize_4bit

    opened = small("nf4").checkpoint
    hf_writer.write(opened, "bfloat16", tmp_path / "folder", packed=True)
    found = {k: v for file in (tmp_path / "folder").glob("*.safetensors") for k, v in load_file(file).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    state = {each.removeprefix(f"{name}."): tensor for each, tensor in found.items() if each.startswith(f"{name}.")}
    decoded = dequantize_4bit(found[name], QuantState.from_dict(state, device=torch.device("cpu")))
    ours = opened.weight(name.replace("model.", "language_model.", 1))
    assert torch.equal(decoded, ours.decoded(torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_transformers_reads_that_folder_whole(small, tmp_path, name):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    opened = Source.open("tiny").checkpoint if name == "tiny" else small("q4_k").checkpoint
    hf_writer.write(opened, "bfloat16", tmp_path / "folder")
    kind = AutoModelForImageTextToText if name == "tiny" else AutoModelForCausalLM
    model, info = kind.from_pretrained(tmp_path / "folder", dtype="bfloat16", output_loading_info=True)
    assert not any(info[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    weight = model.get_output_embeddings().weight
    assert torch.equal(weight, opened.tensor("lm_head.weight").bfloat16())


def test_a_model_is_measured_as_it_is_unless_another_encoding_is_asked_for(tmp_path):
    assert model_files.of_model("tiny", None, tmp_path).arguments == {"model_path": "tiny"}
    assert model_files.of_model("tiny", "bfloat16", tmp_path).arguments == {"model_path": "tiny"}
    assert not any(tmp_path.iterdir())
    exported = model_files.of_model("tiny", "q4_0", tmp_path)
    assert exported.placement.label == "q4_0" and exported.arguments.keys() == {"serialized_model_path"}
    file = exported.arguments["serialized_model_path"]
    assert model_files.of_model(file, None, tmp_path).arguments == {"serialized_model_path": file}


def test_a_gguf_is_measured_by_both_from_the_same_file(tmp_path):
    source = Source.open("tiny")
    path = tmp_path / "model.gguf"
    gguf_writer.write(source.checkpoint, source.config, path)
    subject = model_files.of_model(str(path), None, tmp_path)
    assert subject.arguments == {"model_path": str(path)}
    assert model_files.for_llama_cpp(subject, tmp_path / "unused") == {"gguf": str(path)}
