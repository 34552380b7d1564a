"""NF4 without bitsandbytes, against bitsandbytes."""

import pytest
import torch
from safetensors.torch import load, save

from pixtral_cli.model.kernels.nf4 import bitsandbytes
from weights_cache.codecs.nf4 import NF4, TABLE
from weights_cache.packed import from_parts


def encoded(shape, dtype=torch.float32, nested=False, block=64):
    """Random weights, what bitsandbytes makes of them (codes and its state), and the same as ours."""
    generator = torch.Generator().manual_seed(shape[0] * shape[1] + block)
    weights = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
    functional = bitsandbytes().functional
    codes, state = functional.quantize_4bit(weights, blocksize=block, compress_statistics=nested, quant_type="nf4")
    parts = (state.state2.absmax, state.state2.code, state.offset.view(1)) if nested else ()
    return weights, codes, state, NF4(codes.view(shape[0], -1), state.absmax, *parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "block"), [((96, 64), 64), ((40, 2560), 64), ((300, 1024), 64), ((64, 256), 128)])
def test_decoding_is_bit_for_bit_that_of_bitsandbytes(dtype, nested, shape, block):
    _, codes, state, ours = encoded(shape, dtype, nested, block)
    assert (ours.shape, ours.block, ours.nested) == (shape, block, nested)
    assert torch.equal(ours.decoded(dtype), bitsandbytes().functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize(("shape", "block"), [((33, 96), 64), ((5, 2), 64), ((7, 90), 128), ((3, 64), 4096)])
def test_blocks_may_go_on_in_the_next_row(shape, block):
    """bitsandbytes' own decoder for the CPU is wrong here; the plain one behind it, which CUDA agrees with, is not."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as plain

    weights, codes, state, ours = encoded(shape, block=block)
    expected = plain(codes.view(-1), state.absmax, torch.tensor(TABLE), block, shape, torch.float32)
    assert torch.equal(ours.decoded(), expected)
    assert (ours.decoded() - weights).abs().max() < 0.16 * weights.abs().max()  # half of the widest step


def test_the_table_is_that_of_bitsandbytes():
    assert torch.equal(torch.tensor(TABLE), bitsandbytes().functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("nested", [False, True])
def test_a_matrix_goes_through_a_file_unchanged(nested):
    _, _, _, ours = encoded((96, 320), nested=nested)
    tensors = load(save(ours.tensors()))
    assert len(tensors) == (5 if nested else 2)
    back = from_parts("nf4", (96, 320), tensors.pop("codes"), tensors)
    assert torch.equal(back.decoded(), ours.decoded()) and back.codes.shape == ours.codes.shape
    assert back.tensors().keys() == ours.tensors().keys()


def test_double_quantisation_takes_an_eighth_of_the_magnitudes():
    bits = [8 * encoded((512, 2048), nested=nested)[3].nbytes / (512 * 2048) for nested in (False, True)]
    assert bits[0] == 4.5 and bits[1] == pytest.approx(4.127, abs=0.01)


def test_a_matrix_without_its_magnitudes_is_no_matrix():
    codes, magnitudes = torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32)
    assert isinstance(from_parts("nf4", (32, 64), codes, {"absmax": magnitudes}), NF4)
    for beside in ({}, {"absmax": magnitudes[1:]}, {"absmax": magnitudes.half()}, {"other": magnitudes}):
        assert from_parts("nf4", (32, 64), codes, beside) is None
