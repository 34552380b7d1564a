"""A model in FP8 from end to end, in both forms: its answers are transformers' with the dequantised weights; what is
made of it is made of their float32 product; and it is kept, saved and counted byte for byte."""

import json

import pytest
import torch
from support import builders, format_builders, fp8_builders
from support.fp8_builders import KINDS
from support.live_bytes import LiveBytes

from pixtral_cli import Pixtral
from pixtral_cli.encoding_choices import find
from pixtral_cli.model import load, memory
from pixtral_cli.source import Source
from weights_cache import checkpoint, codecs
from weights_cache.codecs import fp8
from weights_cache.formats.serialized import SerializedFile
from weights_cache.inventory import main_encoding

PROMPT = "what is in the picture?"
OPTIONS = {"max_new_tokens": 24, "ignore_eos": True}
GATE = "language_model.layers.1.mlp.gate_proj.weight"
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}


FAMILIES = {
    "pixtral": (lambda folder: builders.pixtral(folder, **SIZES), {}),
    "ministral 3": (
        lambda folder: builders.mistral3(folder, text=builders.ministral3_config(**SIZES)),
        {"patch": 14, "merge": 2, "longest": 1540},
    ),
}
"""What makes a model, and what its processor is told."""
LAYERS = "language_model.layers."


@pytest.fixture(scope="module", params=[("ministral 3", KINDS[0]), *(("pixtral", kind) for kind in KINDS)], ids=str)
def models(request, tmp_path_factory):
    """hf/ and native/ in FP8, and transformers' model with what its own dequantiser makes of them."""
    folder, (family, kind) = tmp_path_factory.mktemp("fp8"), request.param
    make, settings = FAMILIES[family]
    oracle = make(folder / "hf")
    processor = builders.add_processor(folder / "hf", **settings)
    found = fp8_builders.convert(folder / "hf", kind, static=kind == KINDS[0])
    exact = {
        LAYERS + name.split("layers.")[1]: found[name]
        for name in found
        if "language_model" in name and "layers." in name
    }
    format_builders.native(folder / "hf", folder / "native")
    format_builders.write_tekken(folder / "hf", folder / "native")
    fp8_builders.as_native(folder / "native")
    oracle.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, weight in exact.items():
            oracle.get_parameter(f"model.{name}").copy_(weight)
    return folder, oracle, processor, exact


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    builders.pixtral(folder, **SIZES)
    builders.add_processor(folder)
    fp8_builders.convert(folder, KINDS[0])
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("form", ["hf", "native"])
def test_tokens_are_those_of_transformers_with_dequantised_weights(models, form):
    folder, oracle, processor, _ = models
    inputs = processor(f"<s>{PROMPT}", [])
    expected = oracle.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    model = Pixtral.load(folder / form, quantization_encoding="float32", image_preprocessing="hf", devices="cpu")
    assert model.complete(PROMPT, **OPTIONS).token_ids == expected.tolist()


@pytest.mark.parametrize("form", ["hf", "native"])
def test_both_forms_have_the_weights_of_the_formula(models, form):
    folder, _, _, exact = models
    opened = checkpoint.open(folder / form)
    for name, weight in exact.items():
        assert torch.equal(opened.tensor(name), weight), name
    assert {opened.tensors[name].encoding for name in exact if name.endswith("_proj.weight")} == {"fp8"}


@pytest.mark.parametrize("encoding", ["q4_0", "bfloat16", "fp8"])
def test_loading_takes_hardly_more_memory_than_the_model_has_in_the_end(folder, encoding):
    """A matrix is decoded at a time: all of them in float32 would take several times as much."""
    source = Source.open(folder)
    placement = source.placement(find(encoding))
    kept, whole = memory.weight_bytes(source.checkpoint.tensors, placement), 4 * SIZES["hidden_size"] * 512
    with LiveBytes() as live:
        weights = [load.encoded(source.checkpoint, name, placement) for name in source.checkpoint.tensors]
    assert kept == sum(weight.nbytes for weight in weights) and live.most <= kept + 5 * whole


@pytest.mark.parametrize("encoding", ["q4_0", "q4_k", "q6_k", "nf4", "bfloat16", "float32"])
def test_every_encoding_is_made_of_the_float32_product(folder, encoding):
    opened = checkpoint.open(folder)
    placement = Source("x", opened).placement(find(encoding))
    exact, found = opened.tensor(GATE), load.encoded(opened, GATE, placement)
    assert exact.dtype == torch.float32
    if encoding in load.DTYPES:
        assert torch.equal(found, exact.to(load.DTYPES[encoding]))
    elif encoding != "nf4":
        assert torch.equal(found.rows, codecs.get(encoding).encode(exact))
    else:
        assert torch.equal(found.decoded(), load.nf4.encode(exact).decoded())


def test_a_file_in_fp8_stays_so_and_its_bytes_are_the_files(folder):
    model = Pixtral.load(folder)
    gate = model.engine.model.language_model.layers[1].mlp.gate_proj.weight
    assert model.encoding == "fp8" and torch.equal(gate.codes, checkpoint.open(folder).weight(GATE).codes)
    assert {
        model.placement.encodings[name] for name in ("lm_head.weight", "multi_modal_projector.linear_1.weight")
    } == {"bfloat16"}


def test_other_weights_are_put_into_fp8_when_asked(tmp_path):
    builders.pixtral(tmp_path, **SIZES)
    builders.add_processor(tmp_path)
    opened = checkpoint.open(tmp_path)
    model = Pixtral.load(tmp_path, quantization_encoding="fp8")
    gate, wanted = model.engine.model.language_model.layers[1].mlp.gate_proj.weight, fp8.encode(opened.tensor(GATE))
    assert torch.equal(gate.codes, wanted.codes) and torch.equal(gate.scales, wanted.scales)
    assert model.engine.model.language_model.embed_tokens.weight.encoding == "fp8"


@pytest.mark.parametrize("kind", [*KINDS, "other weights"])
def test_a_saved_model_holds_it_and_answers_as_the_one_it_was_saved_from(tmp_path, kind):
    builders.pixtral(tmp_path / "hf", **SIZES)
    builders.add_processor(tmp_path / "hf")
    if kind in KINDS:
        fp8_builders.convert(tmp_path / "hf", kind)
    model = Pixtral.load(tmp_path / "hf", quantization_encoding="fp8")
    model.save(tmp_path / "saved")
    model.source.save(tmp_path / "exported", model.placement)
    assert (tmp_path / "saved").read_bytes() == (tmp_path / "exported").read_bytes()
    again = Pixtral.load(serialized_model_path=tmp_path / "saved")
    assert again.encoding == "fp8"
    first, second = (m.complete(PROMPT, logprobs=3, **OPTIONS) for m in (model, again))
    assert (second.token_ids, second.logprobs) == (first.token_ids, first.logprobs)
    again.save(tmp_path / "exported")
    assert (tmp_path / "saved").read_bytes() == (tmp_path / "exported").read_bytes()


def test_programs_that_do_not_know_fp8_are_told_that_the_file_is_too_new(folder, tmp_path):
    for encoding, version in (("q4_k", 1), ("fp8", 3)):
        Pixtral.load(folder, quantization_encoding=encoding).save(tmp_path / encoding)
        metadata = SerializedFile(tmp_path / encoding)._file.metadata
        assert json.loads(metadata["pixtral"])["version"] == version


@pytest.mark.parametrize("wanted", [None, "fp8", "q4_k"])
def test_the_plan_counts_the_bytes_that_are_loaded(folder, wanted):
    source = Source.open(folder)
    placement = source.placement(find(wanted) if wanted else None)
    weights = [load.encoded(source.checkpoint, name, placement) for name in source.checkpoint.tensors]
    assert memory.weight_bytes(source.checkpoint.tensors, placement) == sum(weight.nbytes for weight in weights)


def test_the_plan_counts_the_scales_of_what_is_put_into_fp8(tmp_path):
    builders.mistral(tmp_path)
    source = Source.open(tmp_path)
    placement = source.placement(find("fp8"))
    weights = [load.encoded(source.checkpoint, name, placement) for name in source.checkpoint.tensors]
    assert memory.weight_bytes(source.checkpoint.tensors, placement) == sum(weight.nbytes for weight in weights)


def test_the_list_of_models_calls_it_fp8(folder):
    assert main_encoding(folder / "model.safetensors", folder) == "fp8"
    assert Source.open(folder).needs()[0].encoding == "fp8"
