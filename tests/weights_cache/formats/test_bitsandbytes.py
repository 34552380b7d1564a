"""Folders with layers that bitsandbytes encoded. They are written with its own states, named as transformers does."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pixtral_cli.model.kernels.nf4 import bitsandbytes
from weights_cache import checkpoint
from weights_cache.errors import CheckpointCorrupt, ModelUnsupported

GATE, OURS = "language_model.model.layers.0.mlp.gate_proj.weight", "language_model.layers.0.mlp.gate_proj.weight"
DOWN, OUR_DOWN = GATE.replace("gate", "down"), OURS.replace("gate", "down")
NORM = "language_model.model.norm.weight"
STATE = ".quant_state.bitsandbytes__nf4"
CONFIG = {"model_type": "llava", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def layer(name, shape, double=False, quant_type="nf4", storage=torch.uint8, dtype=torch.bfloat16):
    """The tensors of one layer, and the weights that bitsandbytes decodes from them."""
    functional = bitsandbytes().functional
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)
    codes, state = functional.quantize_4bit(
        weights, compress_statistics=double, quant_type=quant_type, quant_storage=storage
    )
    beside = {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {name: codes, **beside}, functional.dequantize_4bit(codes, state)


def opened(folder, *shards):
    """The checkpoint of these tensors, a dictionary a file."""
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    index = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return checkpoint.open(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
def test_matrices_are_one_tensor_each_and_decode_as_bitsandbytes_does(tmp_path, double, dtype):
    gate, weights = layer(GATE, (96, 320), double, dtype=dtype)
    down, more = layer(DOWN, (320, 128), double, dtype=dtype)
    found = opened(tmp_path, {NORM: torch.ones(320)} | gate | down)
    assert sorted(found.tensors) == [OUR_DOWN, OURS, "language_model.norm.weight"]
    info = found.tensors[OURS]
    assert (info.shape, info.encoding, info.name) == ((96, 320), "nf4", OURS)
    assert torch.equal(found.tensor(OURS).to(dtype), weights)
    assert torch.equal(found.tensor(OUR_DOWN).to(dtype), more)
    assert torch.equal(found.tensor("language_model.norm.weight"), torch.ones(320))


@pytest.mark.parametrize("double", [False, True])
def test_a_matrix_is_handed_on_as_it_is_encoded(tmp_path, double):
    tensors, _ = layer(GATE, (96, 320), double)
    found = opened(tmp_path, tensors)
    encoded = found.weight(OURS)
    assert torch.equal(encoded.codes.flatten(), tensors[GATE].flatten()) and encoded.nested == double
    assert torch.equal(encoded.absmax, tensors[f"{GATE}.absmax"])
    assert found.tensors[OURS].nbytes == encoded.nbytes - (4 if double else 0)  # the offset lies in the state


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_may_be_stored_as_another_dtype(tmp_path, storage):
    tensors, weights = layer(GATE, (96, 320), storage=storage)
    assert tensors[GATE].dtype == storage
    assert torch.equal(opened(tmp_path, tensors).tensor(OURS).bfloat16(), weights)


@pytest.mark.parametrize("double", [False, True])
def test_what_belongs_to_a_matrix_may_lie_in_another_file(tmp_path, double):
    tensors, weights = layer(GATE, (96, 320), double)
    shards = [dict([item]) for item in tensors.items()]
    assert torch.equal(opened(tmp_path, *shards).tensor(OURS).bfloat16(), weights)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    tensors, _ = layer(GATE, (96, 320))
    found = opened(tmp_path, tensors, {f"{GATE}.absmax": tensors[f"{GATE}.absmax"]})
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"absmax.* too"):
        _ = found.tensors


def test_of_a_tensor_in_two_files_the_index_decides_which_counts(tmp_path):
    tensors, weights = layer(GATE, (96, 320))
    old = tensors | {f"{GATE}.absmax": torch.zeros_like(tensors[f"{GATE}.absmax"])}
    found = opened(tmp_path, old, {f"{GATE}.absmax": tensors[f"{GATE}.absmax"]})
    assert torch.equal(found.tensor(OURS).bfloat16(), weights)


def test_fp4_is_named_as_not_known(tmp_path):
    tensors, _ = layer(GATE, (96, 320), quant_type="fp4")
    with pytest.raises(ModelUnsupported, match="fp4, which is not known"):
        _ = opened(tmp_path, tensors).tensors


def test_8_bit_integers_are_named_as_not_known(tmp_path):
    tensors = {GATE: torch.zeros(96, 320, dtype=torch.int8), GATE.replace("weight", "SCB"): torch.ones(96)}
    with pytest.raises(ModelUnsupported, match="8-bit integers, which is not known"):
        _ = opened(tmp_path, tensors).tensors


def with_state(**changes):
    def change(tensors):
        state = json.loads(bytes(tensors[GATE + STATE].tolist())) | changes
        tensors[GATE + STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def without(part):
    return lambda tensors: tensors.pop(GATE + part)


def replaced(part, tensor):
    return lambda tensors: tensors.update({GATE + part: tensor})


DAMAGE = {
    "a state that is no JSON": replaced(STATE, torch.tensor([123, 45], dtype=torch.uint8)),
    "a shape of more weights": with_state(shape=[96, 640]),
    "a shape of three sizes": with_state(shape=[96, 16, 20]),
    "a shape without rows": with_state(shape=[0, 320]),
    "a huge shape": with_state(shape=[2**62, 320]),
    "a shape of no numbers": with_state(shape=["96", "320"]),
    "rows of no whole bytes": with_state(shape=[96 * 64, 5]),
    "other blocks": with_state(blocksize=128),
    "blocks of nothing": with_state(blocksize=0),
    "blocks of a word": with_state(blocksize="64"),
    "another type": with_state(quant_type="fp4"),
    "an offset of a word": with_state(nested_offset="1"),
    "an infinite offset": with_state(nested_offset=float("inf")),
    "nested blocks of another size": with_state(nested_blocksize=128),
    "no magnitudes": without(".absmax"),
    "no nested magnitudes": without(".nested_absmax"),
    "no nested table": without(".nested_quant_map"),
    "no codes": without(""),
    "no table": without(".quant_map"),
    "magnitudes of another dtype": replaced(".absmax", torch.zeros(480)),
    "too few magnitudes": replaced(".absmax", torch.zeros(479, dtype=torch.uint8)),
    "another table": replaced(".quant_map", torch.linspace(-1, 1, 16)),
    "a table of no numbers": replaced(".quant_map", torch.full((16,), float("nan"))),
    "a short nested table": replaced(".nested_quant_map", torch.zeros(255)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_contradicts_itself_is_refused(tmp_path, damage):
    tensors, _ = layer(GATE, (96, 320), double=True)
    damage(tensors)
    with pytest.raises(CheckpointCorrupt, match="gate_proj"):
        _ = opened(tmp_path, tensors).tensors
