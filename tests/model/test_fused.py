"""The fused operations: Triton's forms in its interpreter against float64, and compiled for cards that are not here."""

import pytest
import torch
from support.interpreter import CARDS, compile_for, interpreted


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (3, 1500)], ids=str)
def test_triton_gates_as_the_formula_does(shape, dtype):
    from pixtral_cli.model import fused_triton

    rows, width = shape
    gate_up = random(rows, 2 * width, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    wanted = gate * gate.sigmoid() * up
    torch.testing.assert_close(fused_triton.silu_mul(gate_up), wanted.to(dtype))


@pytest.mark.parametrize("card", CARDS)
def test_the_gate_compiles(card):
    from pixtral_cli.model import fused_triton

    signature = {"gate_up": "*bf16", "out": "*bf16", "width": "i32"}
    assert compile_for(card, fused_triton._silu_mul, signature, {"columns": 1024}).asm["cubin"]
