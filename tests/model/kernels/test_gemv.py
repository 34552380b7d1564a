"""A bfloat16 matrix times few vectors, against float64: in Triton's interpreter, compiled, and on a card."""

import pytest
import torch
from support.interpreter import CARDS, compile_for, interpreted
from torch import nn

from pixtral_cli.model import fused, kernels
from pixtral_cli.model.kernels import KernelLinear
from pixtral_cli.model.kernels.gemv import FEW, SMALL, GemvKernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def random(*shape, seed=0, scale=1.0, dtype=torch.bfloat16):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def difference(found, x, weight):
    wanted = x.double() @ weight.double().T
    return float((found.double() - wanted).norm() / wanted.norm())


@interpreted
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", [(8, 128), (7, 200), (1, 16)], ids=str)
def test_products_are_those_of_float64(shape, rows):
    """The tile of 4 x 64 divides the first shape, and neither side of the others."""
    from pixtral_cli.model.kernels import gemv_triton

    tile = gemv_triton.Tile(4, 64, 4, 3)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):  # the interpreter cuts bfloat16 off
        x, weight = random(rows, shape[1], seed=1, dtype=dtype), random(*shape, dtype=dtype)
        assert difference(gemv_triton.products(x, weight, tile), x, weight) < tolerance


@pytest.mark.parametrize("rows", range(1, FEW + 1))
@pytest.mark.parametrize("card", CARDS)
def test_the_kernel_compiles_for_every_card(card, rows):
    gemv_triton = pytest.importorskip("pixtral_cli.model.kernels.gemv_triton")
    signature = {**dict.fromkeys(("x", "weight", "y"), "*bf16"), "height": "i32", "width": "i32:16"}
    for tile in {gemv_triton.tile_of(rows, width) for width in (4096, 14336)}:
        constants = {"n": rows, "chained": card >= 90, **tile._asdict()}
        warps = constants.pop("warps")
        assert compile_for(card, gemv_triton._products, signature, constants, warps).asm["cubin"]


def test_only_a_card_that_triton_works_on_takes_it(monkeypatch):
    weight = random(1024, 1024)
    taking = {"cpu": False, "cuda": True}
    monkeypatch.setattr(kernels.gemv.triton_support, "available", lambda device: taking[device.type])
    assert not GemvKernel.takes(weight, torch.bfloat16, CPU)
    assert GemvKernel.takes(weight, torch.bfloat16, CUDA)
    assert not GemvKernel.takes(weight.float(), torch.bfloat16, CUDA)
    assert not GemvKernel.takes(weight.float(), torch.float32, CUDA)
    assert not GemvKernel.takes(weight[:, :1000], torch.bfloat16, CUDA)  # rows would begin anywhere
    assert not GemvKernel.takes(weight[: SMALL // 1024 - 1], torch.bfloat16, CUDA)
    taking["cuda"] = False
    assert not GemvKernel.takes(weight, torch.bfloat16, CUDA)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(6144, 5120), (5120, 4096), (5120, 14336), (1030, 1040)], ids=str)
def test_a_card_multiplies_any_number_of_rows(shape):
    weight = random(*shape, scale=0.02)
    assert kernels.choose(weight, torch.bfloat16, CUDA) is GemvKernel
    layer = KernelLinear(GemvKernel(weight, CUDA))
    assert torch.equal(layer.weight.cpu(), weight)
    for rows in (1, 2, FEW, FEW + 1, 40):
        x = random(rows, shape[1], seed=rows)
        assert difference(layer(x.to(CUDA)).cpu(), x, weight) < 2**-8, rows


@pytest.mark.gpu
def test_kernels_that_begin_before_the_one_before_has_ended_see_all_that_it_wrote():
    """In a captured graph, again and again, against the same with a pause after each kernel."""
    norm = nn.RMSNorm(2048, eps=1e-5, device=CUDA, dtype=torch.bfloat16).requires_grad_(False)
    gate_up, down = (GemvKernel(random(*shape, scale=0.02), CUDA) for shape in ((8192, 2048), (2048, 4096)))
    x = random(1, 2048, seed=3).to(CUDA)

    def chain(pause=lambda: None):
        total, delta = x, None
        for _ in range(20):
            total, normed = fused.add_norm(total, delta, norm)
            pause()
            both = gate_up.products[1](normed)
            pause()
            gated = fused.silu_mul(both)
            pause()
            delta = down.products[1](gated)
            pause()
        return total + delta

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(5):
        graph.replay()
        assert torch.equal(found, expected)
