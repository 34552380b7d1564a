"""Torch's 4-bit kernel, against the same weights decoded exactly and multiplied in float32."""

import os
import subprocess
import sys

import gguf
import pytest
import torch
from support import builders
from torch import nn

from pixtral_cli.model.kernels import KernelLinear, int4
from pixtral_cli.model.kernels.int4 import DECODED_FROM, Int4Kernel
from weights_cache import codecs
from weights_cache.packed import PackedRows

TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q4_k": gguf.GGMLQuantizationType.Q4_K}
CPU, GPU = torch.device("cpu"), torch.device("cuda")
pytestmark = pytest.mark.skipif(not int4.supported(), reason="this processor has no such kernel")


def random(*shape, seed=0, scale=0.05):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def layer(encoding, rows, columns, bias=None):
    """A layer of random weights, not centred, and the same in float32 as gguf-py decodes them."""
    packed = codecs.get(encoding).encode(random(rows, columns) + 0.01)
    exact = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), TYPES[encoding]))
    return KernelLinear(Int4Kernel(PackedRows(encoding, packed), CPU), bias), exact


def difference(found, expected):
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("encoding", TYPES)
@pytest.mark.parametrize("tokens", [1, 3, 31, DECODED_FROM - 1, DECODED_FROM, 200])
@pytest.mark.parametrize(
    "shape", [(64, 256), (192, 512), (1088, 2304)], ids=["one block", "several", "more than a tile"]
)
def test_products_agree_with_exactly_decoded_weights(encoding, tokens, shape):
    made, exact = layer(encoding, *shape)
    x = random(tokens, shape[1], seed=1, scale=1).bfloat16()
    y = made(x)
    assert y.dtype == torch.bfloat16 and difference(y, x.float() @ exact.T) < 1e-2


@pytest.mark.parametrize("columns", [32, 96, 160])
@pytest.mark.parametrize("tokens", [1, 200])
def test_rows_of_q4_0_need_no_more_than_whole_blocks_of_32(columns, tokens):
    made, exact = layer("q4_0", 128, columns)
    x = random(tokens, columns, seed=1, scale=1).bfloat16()
    assert difference(made(x), x.float() @ exact.T) < 1e-2


def test_a_bias_is_added_and_the_input_keeps_its_dtype():
    bias = random(64, seed=2, scale=3)
    made, exact = layer("q4_k", 64, 256, nn.Parameter(bias, requires_grad=False))
    x = random(3, 256, seed=1, scale=1)
    y = made(x)
    assert y.dtype == torch.float32 and difference(y, x @ exact.T + bias) < 1e-2


@pytest.mark.parametrize("tokens", [6, 60])
def test_an_input_need_not_be_contiguous(tokens):
    made, x = layer("q4_k", 64, 256)[0], random(256, tokens, scale=1).bfloat16()
    assert torch.equal(made(x.T), made(x.T.contiguous()))


def test_the_kernel_is_taken_for_whole_64_rows_in_bfloat16_on_the_cpu_only():
    def takes(encoding, rows, dtype, device):
        return Int4Kernel.takes(PackedRows(encoding, codecs.get(encoding).encode(random(rows, 256))), dtype, device)

    assert takes("q4_k", 128, torch.bfloat16, CPU) and takes("q4_0", 128, torch.bfloat16, CPU)
    assert not takes("q4_k", 96, torch.bfloat16, CPU)
    assert not takes("q6_k", 128, torch.bfloat16, CPU)
    assert not takes("q4_k", 128, torch.float32, CPU)
    assert not takes("q4_k", 128, torch.bfloat16, GPU)
    assert not Int4Kernel.takes(random(128, 256).bfloat16(), torch.bfloat16, CPU)


def test_a_processor_on_which_torch_orders_codes_otherwise_runs_without_the_kernel(tmp_path):
    """torch itself is told to take this processor for one without AVX-512."""
    builders.pixtral(tmp_path / "hf", hidden_size=256, intermediate_size=512)
    builders.add_processor(tmp_path / "hf")
    program = f"""
import torch
from pixtral_cli import Pixtral
from pixtral_cli.model.kernels import int4
from pixtral_cli.model.kernels.reference import ReferenceKernel
assert torch.backends.cpu.get_cpu_capability() == "AVX2" and not int4.supported()
model = Pixtral.load({str(tmp_path / "hf")!r}, quantization_encoding="q4_k")
assert isinstance(model.engine.model.language_model.layers[0].mlp.up_proj.kernel, ReferenceKernel)
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
