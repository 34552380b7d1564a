"""What only a card can answer is asked by a script; that the script works is known here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.random_models import SPOKEN, RandomCheckpoint, config_of

from pixtral_cli.model import load

CPU = torch.device("cpu")
CHECK = Path(__file__).with_name("gpu_check.py")


def test_the_whole_engine_is_measured_on_a_cpu_with_a_tiny_model(tmp_path):
    path = tmp_path / "rows.json"
    parts = "--only decode,prefill,tower,packed,kv --encodings q4_k,nf4"
    command = [sys.executable, CHECK, "--device", "cpu", "--only", "model", "--model", parts, "--json", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert found["left_out"] == []
    kinds = {(row["work"], row["encoding"]) for row in found["rows"]}
    assert {("decode", "bfloat16"), ("decode", "q4_k"), ("decode", "nf4"), ("prefill", "q4_k")} <= kinds
    assert all(row["ours"] > 0 for row in found["rows"])


def test_without_a_card_the_check_says_so(tmp_path):
    command = [sys.executable, CHECK, "--json", tmp_path / "rows.json"]
    done = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "no CUDA device" in done.stderr


@pytest.mark.parametrize("encoding", ["bfloat16", "q4_0", "q4_k", "q6_k", "q8_0", "fp8", "nf4"])
def test_random_weights_are_those_of_a_sane_model_and_go_the_way_of_a_card(encoding):
    config = config_of("tiny")
    checkpoint = RandomCheckpoint(config, encoding, CPU)
    model, names = load.empty(config), list(checkpoint.tensors)
    assert sorted(load._fill_card(model, checkpoint, names, checkpoint.placement, CPU)) == sorted(names)
    layer = model.language_model.layers[0]
    assert layer.self_attn.qkv_proj is not None and layer.mlp.gate_up_proj is not None
    weight = layer.mlp.down_proj.weight
    weight = weight if isinstance(weight, torch.Tensor) else weight.decoded()
    assert 0.01 < weight.float().std() < 0.05 and weight.float().mean().abs() < 0.01
    head = checkpoint.tensor("lm_head.weight") if encoding == "bfloat16" else None
    assert head is None or not head[SPOKEN:].any()
