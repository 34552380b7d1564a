"""What adding a family takes: its module and its line in the registry. Configs are read without torch."""

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from support import builders
from support.engines import run, tokens
from transformers import GraniteConfig, GraniteForCausalLM

from pixtral_cli.encoding_choices import find
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Request
from pixtral_cli.errors import ModelError
from pixtral_cli.model import families
from pixtral_cli.model.config import ConfigFields, ModelConfig
from pixtral_cli.model.families.mistral import read_text_config
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.load import load
from pixtral_cli.model.placement import place
from weights_cache import checkpoint

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scaled(ModelConfig):
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0


class ScaledModel(LanguageModel):
    """Granite, where its other two multipliers are Mistral's: embeddings are multiplied, logits divided."""

    def embed(self, token_ids, features=None, places=None):
        return super().embed(token_ids, features, places) * self.config.embedding_multiplier

    def logits(self, hidden):
        return super().logits(hidden) / self.config.logits_scaling


def read_config(architecture, raw):
    fields = ConfigFields(raw)
    scales = fields.number("embedding_multiplier"), fields.number("logits_scaling")
    return Scaled(architecture, read_text_config({"sliding_window": None, **raw}), None, None, None, True, *scales)


# What would be families/granite.py.
granite = SimpleNamespace(
    ARCHITECTURES=("GraniteForCausalLM",), MODEL_TYPE="granite", TOWER=None, read_config=read_config, build=ScaledModel
)


def written(folder):
    """A checkpoint that transformers writes, and transformers' model of it."""
    sizes = {**builders.TEXT, "head_dim": 8}
    del sizes["sliding_window"]
    scales = {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "attention_multiplier": 8**-0.5}
    torch.manual_seed(0)
    hf = GraniteForCausalLM(GraniteConfig(**sizes, **scales)).float().eval()
    hf.save_pretrained(folder)
    return hf


def test_a_new_family_needs_its_module_and_its_line_in_the_registry(tmp_path, monkeypatch):
    hf, opened = written(tmp_path), checkpoint.open(tmp_path)
    with pytest.raises(ModelError, match="GraniteForCausalLM"):
        families.read_config(opened.config)
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, granite])
    model = load(opened, families.read_config(opened.config), place(opened.tensors, find("float32")), CPU)
    ids = torch.randint(14, 320, (21,), generator=torch.Generator().manual_seed(1)).tolist()
    [events] = run(Engine(model), Request(tuple(ids), 24))
    hf.generation_config.eos_token_id = None
    expected = hf.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    assert len(set(expected)) > 5 and tokens(events) == expected


def test_a_config_without_architectures_is_known_by_its_model_type(monkeypatch):
    assert families.read_config({"model_type": "mistral"}).architecture == "MistralForCausalLM"
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, granite])
    raw = {"model_type": "granite", "embedding_multiplier": 2.0, "logits_scaling": 1.0}
    assert families.read_config(raw).architecture == "GraniteForCausalLM"


def test_configs_are_read_without_torch():
    program = """
import sys
from pixtral_cli.model import families
assert families.read_config({"architectures": ["MistralForCausalLM"]}).text.hidden_size == 4096
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
