"""Of embedding and head that a config calls one, the file decides: what transformers makes of it, we do too."""

import json
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import builders
from support import format_builders as forms
from transformers import LlavaForConditionalGeneration, MistralForCausalLM

from pixtral_cli import Pixtral
from pixtral_cli.model.memory import weight_bytes
from pixtral_cli.source import Source
from weights_cache.errors import TensorsMissing

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
QUESTION = [{"role": "user", "content": "what is in the picture?"}]
OPTIONS = {"max_new_tokens": 16, "ignore_eos": True}


def keep(folder, *endings):
    """Leave of embedding and head only those that end so."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    dropped = [name for name in tensors if name.endswith((EMBEDDING, HEAD)) and not name.endswith(endings)]
    for name in dropped:
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})


def tie(folder, *sections):
    def edit(config):
        for section in (config, config.get("text_config", {})):
            section.pop("tie_word_embeddings", None)
        for section in sections:
            (config if section == "top" else config["text_config"]).update(tie_word_embeddings=True)

    builders.edit_config(folder, edit)


def load(folder, encoding="float32", **options):
    return Pixtral.load(folder, devices="cpu", quantization_encoding=encoding, **options)


def assert_answers_as(hf, model):
    """The same greedy tokens, and the logits of the prompt's last position."""
    prompt = model.source.chat(QUESTION)
    reply = model.chat(QUESTION, logprobs=5, **OPTIONS)
    hf.generation_config.eos_token_id = None
    ids = torch.tensor([prompt.token_ids])
    expected = hf.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(reply.token_ids) == expected
    with torch.no_grad():
        logprobs = hf(ids).logits[0, -1].log_softmax(-1)
    assert reply.logprobs[0].logprob == pytest.approx(logprobs[expected[0]].item(), abs=1e-4)


@pytest.mark.parametrize("kept", [(EMBEDDING, HEAD), (EMBEDDING,), (HEAD,)], ids=["both", "embedding", "head"])
@pytest.mark.parametrize("section", ["top", "text_config"])
def test_a_tied_pixtral_answers_as_in_transformers_whatever_the_file_holds(tmp_path, section, kept):
    builders.pixtral(tmp_path)
    builders.add_processor(tmp_path)
    tie(tmp_path, section)
    keep(tmp_path, *kept)
    assert_answers_as(LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype="float32"), load(tmp_path))


@pytest.mark.parametrize("kept", [(EMBEDDING, HEAD), (HEAD,)], ids=["both", "head"])
def test_a_tied_text_model_answers_as_in_transformers_whatever_the_file_holds(tmp_path, kept):
    builders.mistral(tmp_path)
    builders.add_processor(tmp_path)
    tie(tmp_path, "top")
    keep(tmp_path, *kept)
    assert_answers_as(MistralForCausalLM.from_pretrained(tmp_path, dtype="float32"), load(tmp_path))


@pytest.mark.parametrize("kept", [(EMBEDDING, HEAD), (EMBEDDING,), (HEAD,)], ids=["both", "embedding", "head"])
def test_tied_embeddings_in_a_params_json_mean_the_same(tmp_path, kept):
    builders.pixtral(tmp_path / "hf")
    builders.add_processor(tmp_path / "hf")
    tie(tmp_path / "hf", "top")
    keep(tmp_path / "hf", *kept)
    forms.native(tmp_path / "hf", tmp_path / "native", tied_embeddings=True)
    forms.write_tekken(tmp_path / "hf", tmp_path / "native")
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="float32")
    assert_answers_as(hf, load(tmp_path / "native"))


def test_without_the_flag_neither_stands_in_for_the_other(tmp_path):
    builders.pixtral(tmp_path)
    builders.add_processor(tmp_path)
    tie(tmp_path)
    keep(tmp_path, HEAD)
    with pytest.raises(TensorsMissing, match="embed_tokens"):
        load(tmp_path)


@pytest.mark.parametrize("encoding", ["bfloat16", "q4_k", "fp8", "nf4"])
@pytest.mark.parametrize("kept", [(EMBEDDING, HEAD), (EMBEDDING,), (HEAD,)], ids=["both", "embedding", "head"])
def test_what_is_planned_and_saved_of_a_tied_model_is_what_is_loaded(tmp_path, monkeypatch, kept, encoding):
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    builders.pixtral(folder, hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32)
    builders.add_processor(folder)
    tie(folder, "top")
    keep(folder, *kept)
    model = load(folder, encoding)
    tensors = Source.open(folder).checkpoint.tensors
    matrices = len(kept)
    assert sum(prod(info.shape) for info in tensors.values() if info.shape[0] == 320) == matrices * 320 * 256
    assert set(model.placement.encodings) == set(tensors)
    model.save(tmp_path / "saved")
    again = Pixtral.load(serialized_model_path=tmp_path / "saved", devices="cpu")
    assert set(again.source.checkpoint.tensors) == set(tensors)
    assert weight_bytes(again.source.checkpoint.tensors, again.placement) == weight_bytes(tensors, model.placement)
    first, second = (each.chat(QUESTION, logprobs=5, **OPTIONS) for each in (model, again))
    assert (second.token_ids, second.logprobs) == (first.token_ids, first.logprobs)
    config = json.loads((folder / "config.json").read_text())
    assert again.source.checkpoint.config == config
