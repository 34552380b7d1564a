"""Mistral 3 against transformers' own, in every form, on random checkpoints whose head is not the embedding.

That its logits and tokens are transformers' in batches is in `test_against_transformers`, which asks every family.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import builders, fp8_builders
from support import format_builders as forms
from support.devices import loaded
from support.oracles import assert_answers_as, hf_pictures, our_logits, prompt_with
from support.pictures import conversation, noise
from transformers import Mistral3ForConditionalGeneration, MistralConfig

from pixtral_cli import Pixtral
from pixtral_cli.commands import inspect
from pixtral_cli.errors import ModelError
from pixtral_cli.model.families import read_config
from pixtral_cli.model.kernels.nf4 import bitsandbytes
from pixtral_cli.model.vision import PatchMerger
from pixtral_cli.source import Source
from weights_cache import checkpoint
from weights_cache.errors import TensorShapeMismatch, TensorsMissing

FORMS = ("hf", "newer", "native", "gguf")
CONVERSATIONS = {
    "text": conversation(),
    "picture": conversation(noise(70, 40)),
    "one token": conversation(noise(20, 9), noise(5, 60)),
    "pictures": conversation(noise(200, 33, 1), noise(16, 100, 2), noise(1700, 30, 3)),
}


TEXTS = {"mistral": None, "ministral3": builders.ministral3_config()}


@pytest.fixture(scope="module", params=TEXTS)
def models(request, tmp_path_factory):
    """A folder with one model in each of FORMS, and transformers' own model and processor."""
    folder = tmp_path_factory.mktemp("mistral3")
    oracle = builders.mistral3(folder / "hf", text=TEXTS[request.param])
    processor = builders.add_processor(folder / "hf", patch=14, merge=2, longest=1540)
    write_newer(folder / "hf", folder / "newer")
    forms.native(folder / "hf", folder / "native")
    forms.write_tekken(folder / "hf", folder / "native")
    (folder / "gguf").mkdir()
    forms.gguf_text(folder / "hf", folder / "gguf/model-f32.gguf")
    forms.gguf_pictures(folder / "hf", folder / "gguf/mmproj-f32.gguf")
    return folder, oracle, processor


def write_newer(source, folder):
    """The same files, the tensors named as transformers names its modules since 4.52."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file({newer(name): tensor for name, tensor in forms.tensors(source).items()}, folder / "model.safetensors")


def newer(name):
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def load(path, **options):
    return Pixtral.load(
        path, devices="cpu", image_preprocessing="hf", **{"quantization_encoding": "float32", **options}
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_tokens_and_logits_of_transformers(models, form, name):
    folder, oracle, processor = models
    assert_answers_as(load(folder / form), oracle, processor, CONVERSATIONS[name])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_very_same_weights(models, form):
    hf, other = checkpoint.open(models[0] / "hf"), checkpoint.open(models[0] / form)
    assert other.tensors.keys() == hf.tensors.keys() and "lm_head.weight" in hf.tensors
    for name in hf.tensors:
        assert other.tensor(name).equal(hf.tensor(name)), name


def test_the_names_of_newer_files_are_those_of_transformers_modules(models):
    named = {name for name, _ in models[1].named_parameters()}
    assert set(load_file(models[0] / "newer/model.safetensors")) == named


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_same_sizes(models, form):
    expected, found = (read_config(checkpoint.open(models[0] / each).config) for each in ("hf", form))
    for part in ("text", "vision", "image_layout", "image_token_id", "projector_bias", "merge"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert replace(ours, tied_embeddings=True) == theirs if part == "text" else ours == theirs
    assert found.image_layout.token_size == 28 and found.image_layout.longest_side == 1540


def test_a_serialized_model_is_the_same_model(models, tmp_path):
    folder, oracle, processor = models
    load(folder / "native").save(tmp_path / "model.pixtral")
    again = Pixtral.load(serialized_model_path=tmp_path / "model.pixtral", image_preprocessing="hf", devices="cpu")
    assert_answers_as(again, oracle, processor, CONVERSATIONS["pictures"])


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_squares_of_patches_are_what_unfold_makes_of_them(merge):
    merger = PatchMerger(8, merge)
    rows, columns = 2 * merge, 5 * merge
    patches = torch.randn(rows * columns, 8)
    grid = patches.view(rows, columns, 8).permute(2, 0, 1)[None]
    unfolded = torch.nn.functional.unfold(grid, merge, stride=merge)[0].T
    expected = unfolded @ merger.merging_layer.weight.T
    torch.testing.assert_close(merger(patches, [(rows, columns)]), expected)


@pytest.mark.parametrize("changes", [{"merge": 1}, {"merge": 3}, {"patch_size": 16}, {"hidden_size": 88}], ids=str)
def test_other_sizes_are_read_from_the_config(tmp_path, changes):
    """Heads of 22 numbers cannot be turned in four; of 44 and 88 they can, as in Pixtral Large."""
    if "hidden_size" in changes:
        changes = {**changes, "num_attention_heads": 2}
    hf, ours = builders.mistral3(tmp_path, **changes), loaded(tmp_path)
    side = ours.config.image_layout.token_size
    assert side == changes.get("patch_size", 14) * changes.get("merge", 2)
    ids, pictures = prompt_with([(2, 3), (1, 4)], side)
    with torch.no_grad():
        expected = hf(torch.tensor([ids]), **hf_pictures(pictures)).logits[0]
    torch.testing.assert_close(our_logits(ours, ids, pictures), expected, atol=1e-4, rtol=0)


def test_gelu_in_a_vision_config_means_silu(models, tmp_path):
    folder, oracle, processor = models
    write_newer(folder / "hf", tmp_path / "gelu")
    builders.edit_config(tmp_path / "gelu", lambda config: config["vision_config"].update(hidden_act="gelu"))
    assert_answers_as(load(tmp_path / "gelu"), oracle, processor, CONVERSATIONS["picture"])


def test_inspect_says_how_large_pictures_may_be_and_what_becomes_a_token(models):
    shown = inspect.as_object("some/model", Source.open(models[0] / "native"))
    assert shown["architecture"] == "Mistral3ForConditionalGeneration"
    assert shown["vision"].items() >= {"image_size": 1540, "patch_size": 14, "token_size": 28, "layers": 3}.items()
    assert "up to 1540 px, in patches of 14 px, a token for each 2x2 of them" in inspect.as_text(shown)


class TestTies:
    """The head is the file's own if it has one, and else the embedding."""

    def test_as_published_the_head_of_a_file_counts_though_nothing_is_said(self, models):
        ours = load(models[0] / "hf").engine.model
        assert not ours.lm_head.weight.equal(ours.language_model.embed_tokens.weight)
        hf = Mistral3ForConditionalGeneration.from_pretrained(models[0] / "hf")
        assert hf.lm_head.weight.equal(models[1].lm_head.weight)

    def test_without_a_head_the_embedding_is_the_head_in_every_form(self, tmp_path):
        oracle = builders.mistral3(tmp_path / "hf", tied=True)
        processor = builders.add_processor(tmp_path / "hf", patch=14, merge=2, longest=1540)
        assert not any("lm_head" in name for name in forms.tensors(tmp_path / "hf"))
        forms.native(tmp_path / "hf", tmp_path / "native")
        forms.write_tekken(tmp_path / "hf", tmp_path / "native")
        (tmp_path / "gguf").mkdir()
        forms.gguf_text(tmp_path / "hf", tmp_path / "gguf/model-f32.gguf")
        forms.gguf_pictures(tmp_path / "hf", tmp_path / "gguf/mmproj-f32.gguf")
        for form in ("hf", "native", "gguf"):
            assert_answers_as(load(tmp_path / form), oracle, processor, CONVERSATIONS["picture"])

    def test_without_an_embedding_the_head_is_the_embedding(self, tmp_path):
        oracle = builders.mistral3(tmp_path, tied=True)
        processor = builders.add_processor(tmp_path, patch=14, merge=2, longest=1540)
        weights = forms.tensors(tmp_path)
        weights["language_model.lm_head.weight"] = weights.pop("language_model.model.embed_tokens.weight")
        save_file(weights, tmp_path / "model.safetensors")
        assert_answers_as(load(tmp_path), oracle, processor, CONVERSATIONS["text"])

    def test_a_head_that_is_said_to_be_there_and_is_not_is_missing(self, tmp_path):
        builders.mistral3(tmp_path, tied=True)
        builders.edit_config(tmp_path, lambda config: config.update(tie_word_embeddings=False))
        with pytest.raises(TensorsMissing, match="lm_head"):
            loaded(tmp_path)


class TestRefusals:
    """One sentence each, before any weight is read."""

    @pytest.mark.parametrize("form", FORMS)
    def test_a_merger_of_another_width(self, models, tmp_path, monkeypatch, form):
        for file in (models[0] / form).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        opened = checkpoint.open(tmp_path)
        opened.config["spatial_merge_size"] = 3
        monkeypatch.setattr(checkpoint.Checkpoint, "weight", lambda self, name: pytest.fail(f"{name} was read"))
        with pytest.raises(TensorShapeMismatch, match=r"merging_layer.*\[64, 256\].*\[64, 576\]"):
            Source("", opened).save(tmp_path / "out", Source("", opened).placement(None))

    @pytest.mark.parametrize("value", [0, -1, "2", 1.5])
    def test_a_merge_that_is_no_size(self, models, value):
        config = json.loads((models[0] / "hf/config.json").read_text())
        with pytest.raises(ModelError, match="spatial_merge_size"):
            read_config({**config, "spatial_merge_size": value})


class TestNf4:
    """Folders of bitsandbytes, as most people have these models; what is skipped is listed under every spelling."""

    SKIPPED = (
        "lm_head",
        "vision_tower",
        "model.vision_tower",
        "multi_modal_projector",
        "modality_projection",
        "router",
    )

    @pytest.mark.parametrize("naming", ["older", "newer"])
    def test_a_folder_answers_as_its_decoded_weights_do(self, tmp_path, naming):
        # bitsandbytes decodes rows that are not whole blocks of 64 wrongly on a CPU.
        text = MistralConfig(**{**builders.TEXT, "intermediate_size": 128})
        builders.mistral3(tmp_path / "hf", text=text)
        processor = builders.add_processor(tmp_path / "hf", patch=14, merge=2, longest=1540)
        write_newer(tmp_path / "hf", tmp_path / "nf4")
        packed, decoded = {}, {}
        for name, weight in forms.tensors(tmp_path / "hf").items():
            theirs = newer(name) if naming == "newer" else name
            if weight.ndim == 2 and "language_model.model.layers" in name:
                packed |= encoded(theirs, weight, double="mlp" in name)
                decoded[name] = dequantized(packed, theirs)
            else:
                packed[theirs] = decoded[name] = weight
        save_file({name: tensor.contiguous() for name, tensor in packed.items()}, tmp_path / "nf4/model.safetensors")
        save_file(decoded, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
        quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        quantization["llm_int8_skip_modules"] = list(self.SKIPPED)
        builders.edit_config(tmp_path / "nf4", lambda config: config.update(quantization_config=quantization))
        oracle = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
        assert Source.open(tmp_path / "nf4").placement(None).label == "nf4"
        assert_answers_as(load(tmp_path / "nf4"), oracle, processor, CONVERSATIONS["picture"])


@pytest.mark.parametrize("naming", ["older", "newer", "native"])
def test_ministral_3_in_fp8_as_it_is_published_answers_as_its_decoded_weights_do(tmp_path, naming):
    builders.mistral3(tmp_path / "hf", text=builders.ministral3_config())
    processor = builders.add_processor(tmp_path / "hf", patch=14, merge=2, longest=1540)
    shutil.copytree(tmp_path / "hf", tmp_path / "older")
    exact = fp8_builders.convert(tmp_path / "older", fp8_builders.TENSOR)
    if naming == "newer":
        write_newer(tmp_path / "older", tmp_path / "newer")
    if naming == "native":
        forms.native(tmp_path / "older", tmp_path / "native")
        forms.write_tekken(tmp_path / "hf", tmp_path / "native")
        fp8_builders.as_native(tmp_path / "native")
    save_file(exact, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    oracle = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    assert Source.open(tmp_path / naming).placement(None).label == "fp8"
    assert_answers_as(load(tmp_path / naming), oracle, processor, CONVERSATIONS["picture"])


def encoded(name, weight, double):
    """What bitsandbytes saves of a matrix."""
    codes, state = bitsandbytes().functional.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    return {name: codes, **{f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}}


def dequantized(saved, name):
    functional = bitsandbytes().functional
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in saved.items() if key.startswith(f"{name}.")}
    return functional.dequantize_4bit(saved[name], functional.QuantState.from_dict(parts, torch.device("cpu")))
