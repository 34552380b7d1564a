"""A Hub on localhost with one Pixtral-like repository, and a cache of its own for each test."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from support import fake_hub

REPO = "acme/pixtral-small"
FIRST, SECOND = (f"model-{n:05d}-of-00002.safetensors" for n in (1, 2))


def repository() -> dict[str, bytes]:
    """A repository with everything that a real one has, both weight formats and files that nobody here wants."""
    weights = {
        FIRST: save({"model.embed_tokens.weight": torch.ones(300, 100)}),
        SECOND: save({"lm_head.weight": torch.zeros(300, 100)}),
    }
    index = {"weight_map": {"model.embed_tokens.weight": FIRST, "lm_head.weight": SECOND}}
    unwanted = ["README.md", "consolidated.safetensors", "params.json", "pytorch_model.bin", "model-q4.gguf"]
    unwanted += ["onnx/model.onnx", "onnx/config.json", "run_me.py", "optimizer.pt", "adapter_model.safetensors"]
    wanted = {
        "config.json": b"{}",
        "generation_config.json": b'{"e": 1}',
        "tokenizer.json": b'{"model": {}}',
        "tokenizer_config.json": b'{"a": 1}',
        "tekken.json": b'{"b": 1}',
        "chat_template.jinja": b"{{ messages }}",
        "preprocessor_config.json": b'{"c": 1}',
        "processor_config.json": b'{"d": 1}',
        "model.safetensors.index.json": json.dumps(index).encode(),
    }
    return {name: b"unwanted " + name.encode() for name in unwanted} | weights | wanted


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The running server; the environment points at it and at an empty cache, and the library never waits."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it reads the environment once
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with fake_hub.serving(fake_hub.FakeHub(repos={REPO: repository()})) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
