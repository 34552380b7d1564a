"""Folders with matrices in FP8: which tensors they have, what weights these are, and what is refused in a sentence.

Oracles: transformers' dequantiser, and the formula in torch's own float8.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from support import fp8_builders
from support.fp8_builders import KINDS

from weights_cache import checkpoint
from weights_cache.codecs.fp8 import FP8
from weights_cache.errors import CheckpointCorrupt

GATE, OURS = "language_model.model.layers.0.mlp.gate_proj.weight", "language_model.layers.0.mlp.gate_proj.weight"
NORM = "language_model.model.norm.weight"
SCALE, MODULE = f"{GATE}_scale_inv", GATE.removesuffix("weight")
CONFIG = {"model_type": "llava", "quantization_config": {"quant_method": "fp8"}}


def weights(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def opened(folder, *shards):
    """The checkpoint of these tensors, a dictionary a file."""
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors")
    index = {
        name: f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n, some in enumerate(shards) for name in some
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return checkpoint.open(folder)


def layer(kind=KINDS[0], shape=(96, 320)):
    codes, scale = fp8_builders.encoded(weights(*shape), kind)
    return {GATE: codes, SCALE: scale}


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_one_tensor_whose_weights_are_those_of_transformers(tmp_path, kind):
    tensors = layer(kind)
    found = opened(tmp_path, tensors | {NORM: torch.ones(320), f"{MODULE}activation_scale": torch.tensor(2.0)})
    assert sorted(found.tensors) == [OURS, "language_model.norm.weight"]
    info, weight = found.tensors[OURS], found.weight(OURS)
    assert (info.shape, info.encoding, info.name, info.nbytes) == ((96, 320), "fp8", OURS, weight.nbytes)
    assert isinstance(weight, FP8) and torch.equal(weight.codes, tensors[GATE].view(torch.uint8))
    exact = fp8_builders.decoded(*tensors.values())
    assert torch.equal(found.tensor(OURS), exact)
    assert torch.equal(weight.decoded(torch.bfloat16), exact.bfloat16())


def test_every_code_means_what_torch_says(tmp_path):
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[(codes & 127) != 127].expand(4, -1).contiguous().view(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0], [3e-40], [2.0**110 * 1.1], [1 / 3]])
    found = opened(tmp_path, {GATE: codes, SCALE: scale})
    assert torch.equal(found.tensor(OURS), codes.float() * scale)


@pytest.mark.parametrize(("shape", "blocks"), [((300, 200), (3, 2)), ((192, 576), (2, 5)), ((256, 384), (2, 3))])
def test_blocks_of_128_may_be_cut_off_at_the_ends(tmp_path, shape, blocks):
    """transformers reads only grids that divide the matrix, and would take 192 rows for two blocks of 96."""
    codes, scale = weights(*shape).to(torch.float8_e4m3fn), weights(*blocks).abs() + 0.1
    each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    found = opened(tmp_path, {GATE: codes, SCALE: scale})
    assert torch.equal(found.tensor(OURS), codes.float() * each)
    assert found.weight(OURS).nbytes == found.tensors[OURS].nbytes


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "qscale_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(), (1,), (96,), (96, 1)])
def test_scales_have_several_names_dtypes_and_shapes(tmp_path, name, dtype, shape):
    codes, scale = weights(96, 320).to(torch.float8_e4m3fn), (weights(*shape).abs() + 0.1).to(dtype)
    found = opened(tmp_path, {GATE: codes, MODULE + name: scale})
    assert torch.equal(found.tensor(OURS), codes.float() * scale.float().reshape(-1, 1))


def test_ranges_of_activations_are_left_out(tmp_path):
    others = ("input_scale", "activation_scale", "qscale_act", "fake_quantizer.qscale_act", "k_scale")
    found = opened(tmp_path, layer() | {MODULE + name: torch.ones(1) for name in others})
    assert list(found.tensors) == [OURS]


def test_a_scale_may_lie_in_another_file(tmp_path):
    tensors = layer()
    found = opened(tmp_path, {GATE: tensors[GATE]}, {SCALE: tensors[SCALE]})
    assert torch.equal(found.tensor(OURS), fp8_builders.decoded(*tensors.values()))


def test_a_tensor_in_two_files_is_refused(tmp_path):
    found = opened(tmp_path, layer(), {SCALE: torch.tensor(1.0)})
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"scale_inv.* too"):
        _ = found.tensors


OF_HEADERS = {
    "no scale": ({SCALE: None}, "no scale of it stands beside it"),
    "a scale of another size": ({SCALE: torch.ones(5, 1)}, "is no scale of"),
    "a scale of more dimensions": ({SCALE: torch.ones(1, 1, 1)}, "is no scale of"),
    "a scale of nothing": ({SCALE: torch.ones(0)}, "is no scale of"),
    "a scale of whole numbers": ({SCALE: torch.ones(1, dtype=torch.int32)}, "is no scale of"),
    "no matrix": ({GATE: torch.ones(96).to(torch.float8_e4m3fn)}, "is no scale of"),
    "a bias": ({f"{MODULE}bias": torch.ones(96).to(torch.float8_e4m3fn)}, "no scale of it"),
}


@pytest.mark.parametrize("damage", OF_HEADERS)
def test_what_cannot_be_a_matrix_in_fp8_is_refused_by_headers_alone(tmp_path, damage):
    changes, said = OF_HEADERS[damage]
    tensors = {name: tensor for name, tensor in (layer() | changes).items() if tensor is not None}
    with pytest.raises(CheckpointCorrupt, match=said):
        _ = opened(tmp_path, tensors).tensors


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.inf, torch.nan, 1e36])
def test_a_scale_that_is_not_finite_and_positive_is_refused_before_any_matrix_is_read(tmp_path, scale):
    other = {name.replace("gate", "up"): tensor for name, tensor in layer().items()}
    found = opened(tmp_path, {**layer(), **other, SCALE.replace("gate", "up"): torch.tensor(scale)})
    with pytest.raises(CheckpointCorrupt, match=r"up_proj.*not finite and positive"):
        found.weight(OURS)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_weights_that_are_not_a_number_are_refused(tmp_path, code):
    tensors = layer()
    tensors[GATE].view(torch.uint8)[95, 319] = code
    with pytest.raises(CheckpointCorrupt, match=r"gate_proj.*not a number"):
        opened(tmp_path, tensors).weight(OURS)
