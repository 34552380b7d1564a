"""bitsandbytes' kernels, against the same weights decoded exactly and multiplied in float32."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from pixtral_cli.model import kernels
from pixtral_cli.model.kernels import KernelLinear, nf4
from pixtral_cli.model.kernels.nf4 import NF4Kernel, encode
from weights_cache.codecs.nf4 import NF4

CPU = torch.device("cpu")


def random(*shape, seed=0, scale=0.05):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def difference(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 320), (40, 128), (1100, 1024)])  # the last is encoded in two pieces
def test_encoding_is_that_of_bitsandbytes(double, dtype, shape):
    weights = random(*shape).to(dtype)
    found = encode(weights, double)
    codes, state = nf4.bitsandbytes().functional.quantize_4bit(weights, compress_statistics=double, quant_type="nf4")
    assert torch.equal(found.codes.flatten(), codes.flatten()) and torch.equal(found.absmax, state.absmax)
    assert found.nested == double
    if double:
        assert torch.equal(found.nested_absmax, state.state2.absmax)
        assert torch.equal(found.nested_quant_map, state.state2.code)
        assert found.nested_offset.item() == state.offset.item()


def layer_of(weight, bias=None, device=CPU):
    """What the registry chooses for the weight."""
    return KernelLinear(kernels.choose(weight, torch.bfloat16, device)(weight, device), bias)


SHAPES = {
    "whole tiles": (128, 512),
    "rows that few kernels take": (50, 128),
    "many rows": (2080, 64),
    "blocks that go on in the next row": (64, 96),
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 71])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_agree_with_exactly_decoded_weights(double, tokens, shape):
    weight = encode(random(*shape), double)
    x = random(tokens, shape[1], seed=1, scale=1).to(torch.bfloat16)
    y = layer_of(weight)(x)
    assert y.dtype == torch.bfloat16 and difference(y, x.float() @ weight.decoded().T) < 1e-2


def test_a_bias_is_added_and_the_input_keeps_its_dtype():
    weight, bias = encode(random(64, 128)), random(64, seed=2, scale=3)
    x = random(3, 128, seed=1, scale=1)
    y = layer_of(weight, nn.Parameter(bias, requires_grad=False))(x)
    assert y.dtype == torch.float32 and difference(y, x @ weight.decoded().T + bias) < 1e-2


def test_an_input_need_not_be_contiguous():
    layer, x = layer_of(encode(random(64, 128))), random(128, 6, scale=1).to(torch.bfloat16)
    assert torch.equal(layer(x.T), layer(x.T.contiguous()))


@pytest.mark.parametrize("double", [False, True])
def test_a_layer_is_restored_from_tensors_without_encoding_again(double, monkeypatch):
    layer = layer_of(encode(random(128, 256), double))
    x = random(4, 256, seed=1, scale=1).to(torch.bfloat16)
    tensors = {name: tensor.clone() for name, tensor in layer.weight.tensors().items()}
    monkeypatch.setattr(nf4.bitsandbytes().functional, "quantize_4bit", None)
    assert torch.equal(layer_of(NF4(**tensors))(x), layer(x))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("tokens", [1, 71])
def test_bitsandbytes_kernel_for_gpus_is_told_what_the_weight_is(double, tokens):
    """On the CPU, where bitsandbytes multiplies as well."""
    weight, x = encode(random(128, 256), double), random(tokens, 256, seed=1, scale=1).to(torch.bfloat16)
    found = NF4Kernel(weight, CPU).products[1](x)
    assert found.dtype == torch.bfloat16 and difference(found, x.float() @ weight.decoded().T) < 1e-2


def test_it_takes_whole_blocks_in_nf4_on_a_gpu_only():
    gpu = torch.device("cuda")
    assert NF4Kernel.takes(encode(random(50, 128)), torch.bfloat16, gpu)
    assert not NF4Kernel.takes(encode(random(64, 96)), torch.bfloat16, gpu)
    assert not NF4Kernel.takes(encode(random(64, 128)), torch.bfloat16, CPU)
    assert not NF4Kernel.takes(random(64, 128), torch.bfloat16, gpu)


def test_layers_bring_no_compiler_and_no_kernel_from_the_hub():
    program = """
import sys, types, torch
fetched = []
kernels = types.ModuleType("kernels")
kernels.get_kernel = lambda *args, **options: fetched.append(args)
sys.modules["kernels"] = kernels
compiler = torch.compile
from pixtral_cli.model.kernels.nf4 import NF4Kernel, encode
assert "bitsandbytes" not in sys.modules
NF4Kernel(encode(torch.ones(64, 128), double=True), torch.device("cpu")).products[1](torch.ones(1, 128))
assert "torch._dynamo" not in sys.modules and not fetched
assert torch.compile is compiler and sys.modules["kernels"] is kernels
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tokens", [1, 100])
def test_a_gpu_agrees_with_exactly_decoded_weights(double, shape, tokens):
    gpu = torch.device("cuda")
    weights, x = random(*shape), random(tokens, shape[1], seed=1, scale=1).to(torch.bfloat16)
    encoded = encode(weights.to(gpu), double)
    assert difference(encoded.decoded().cpu(), encode(weights, double).decoded()) < 1e-2
    y = layer_of(encoded, device=gpu)(x.to(gpu))
    assert y.is_cuda and difference(y.cpu(), x.float() @ encoded.decoded().cpu().T) < 1e-2


@pytest.mark.gpu
def test_a_layer_of_the_cpu_moves_to_a_gpu():
    layer, x = layer_of(encode(random(128, 256))), random(4, 256, seed=1, scale=1).to(torch.bfloat16)
    moved = layer_of(layer.weight, device=torch.device("cuda"))
    assert difference(moved(x.cuda()).cpu(), layer(x)) < 1e-2


def test_a_prompt_of_several_chunks_is_answered():
    """Of all but the last chunk no logits are wanted: a product of no rows ends the process inside bitsandbytes."""
    program = """
from pixtral_cli import Pixtral
model = Pixtral.load("tiny", devices="cpu", quantization_encoding="nf4")
model.chat([{"role": "user", "content": "what is " * 1500}], max_new_tokens=2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
