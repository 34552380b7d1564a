"""The fused operations against their formulas in float64: Triton's forms in its interpreter, compiled for cards that
are not here, and on a card that is here."""

from pathlib import Path

import pytest
import torch
from support.interpreter import CARDS, compile_for, interpreted
from torch import nn

from pixtral_cli.model import fused, triton_support

CPU = torch.device("cpu")
CUDA = pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EPSILON = 1e-5


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found, exact, dtype):
    """Rounded once. The interpreter cuts off what a card rounds: a whole unit in the last place of bfloat16."""
    wanted = exact.to(dtype)
    assert found.dtype == dtype and found.shape == wanted.shape
    tolerance = {torch.float32: (1e-6, 2e-6), torch.bfloat16: (1e-6, 2**-7)}[dtype]
    torch.testing.assert_close(found.cpu(), wanted, atol=tolerance[0], rtol=tolerance[1])


def gated(gate_up):
    gate, up = gate_up.double().chunk(2, dim=1)
    return gate * gate.sigmoid() * up


def normed(x, weight):
    x = x.double()
    return x / (x.square().mean(1, keepdim=True) + EPSILON).sqrt() * weight.double()


def turned(x, angles):
    """Pairs (x[i], x[i + D/2]) as complex numbers, times e^(i angle)."""
    first, second = x.double().chunk(2, dim=-1)
    z = torch.complex(first, second) * torch.exp(1j * angles.double())[:, None]
    return torch.cat([z.real, z.imag], dim=-1)


def heads_and_angles(tokens, heads, kv_heads, dim, dtype):
    """q and k as views of one matrix, the angles, and what turns by them; float32 angles of few bits."""
    qkv = random(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype).unflatten(1, (-1, dim))
    q, k, _ = qkv.split([heads, kv_heads, kv_heads], dim=1)
    return qkv, q, k, random(tokens, dim // 2, seed=1)


@interpreted
@DTYPES
@pytest.mark.parametrize("shape", [(1, 8), (3, 1500)], ids=str)
def test_triton_gates_as_the_formula_does(shape, dtype):
    from pixtral_cli.model import fused_triton

    gate_up = random(shape[0], 2 * shape[1], dtype=dtype)
    close(fused_triton.silu_mul(gate_up), gated(gate_up), dtype)


@interpreted
@DTYPES
@pytest.mark.parametrize("shape", [(1, 8), (3, 320)], ids=str)
@pytest.mark.parametrize("adds", [True, False])
def test_triton_adds_and_norms_as_the_formulas_do(shape, dtype, adds):
    from pixtral_cli.model import fused_triton

    x, weight = random(*shape, dtype=dtype), random(shape[1], seed=2, dtype=dtype)
    delta = random(*shape, seed=1, dtype=dtype) if adds else None
    before = x.clone()
    total, found = fused_triton.add_norm(x, delta, weight, EPSILON)
    close(total, x.double() if delta is None else x.double() + delta.double(), dtype)
    close(found, normed(total, weight), dtype)
    assert torch.equal(x, before)
    close(fused_triton.add_norm(x, x, weight, EPSILON)[0], 2 * x.double(), dtype)


@interpreted
@DTYPES
@pytest.mark.parametrize("sizes", [(3, 4, 4, 16), (2, 9, 3, 24), (1, 1, 1, 2)], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_triton_rotates_views_of_one_matrix_and_nothing_else_of_it(sizes, dtype, scaled):
    from pixtral_cli.model import fused_triton
    from pixtral_cli.model.rotary import cos_sin

    qkv, q, k, angles = heads_and_angles(*sizes, dtype)
    before = qkv.clone()
    exact = cos_sin(angles, torch.float32)
    scales = [random(sizes[0], 1, 1, seed=2).abs()] if scaled else []
    fused_triton.rotate(q, k, *exact, *scales)
    heads = sizes[1] + sizes[2]
    wanted = turned(before[:, :heads], angles)
    for each in scales:
        wanted[:, : sizes[1]] *= each
    close(qkv[:, :heads], wanted, dtype)
    assert torch.equal(qkv[:, heads:], before[:, heads:])


@interpreted
def test_triton_takes_no_tokens():
    from pixtral_cli.model import fused_triton

    none = torch.empty(0, 2, 8)
    assert fused_triton.silu_mul(torch.empty(0, 8)).shape == (0, 4)
    assert fused_triton.add_norm(torch.empty(0, 8), torch.empty(0, 8), torch.ones(8), EPSILON)[1].shape == (0, 8)
    assert fused_triton.rotate(none, none, torch.empty(0, 1, 8), torch.empty(0, 1, 8))[0].shape == (0, 2, 8)


SIGNATURES = {
    "_silu_mul": ({"gate_up": "*bf16", "out": "*bf16", "width": "i32"}, {"columns": 1024}),
    "_add_norm": (
        {
            **dict.fromkeys(("x", "delta", "weight", "total", "normed"), "*bf16"),
            "width": "i32",
            "epsilon": "fp32",
        },
        {"adds": True, "columns": 8192},
    ),
    "_rotate": (
        {
            **dict.fromkeys(("q", "k", "cos", "sin", "scales"), "*bf16"),
            **dict.fromkeys(("q_token", "q_head", "k_token", "k_head", "q_heads", "k_heads", "half"), "i32"),
        },
        {"scaled": True, "heads": 8, "columns": 64},
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_compiles_for_every_card(card, name):
    fused_triton = pytest.importorskip("pixtral_cli.model.fused_triton")
    signature, constants = SIGNATURES[name]
    kernel = getattr(fused_triton, name)
    assert compile_for(card, kernel, signature, {**constants, "chained": card >= 90}).asm["cubin"]


@DTYPES
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_every_device_computes_the_formulas(device, tokens, dtype):
    norm = nn.RMSNorm(5120, eps=EPSILON, device=device, dtype=dtype).requires_grad_(False)
    norm.weight.copy_(random(5120, seed=2))
    x, delta, gate_up = (random(tokens, 5120, seed=seed, dtype=dtype) for seed in range(3))
    total, found = fused.add_norm(x.to(device), delta.to(device), norm)
    assert torch.equal(total.cpu(), x + delta)
    close(found, normed(x + delta, norm.weight.cpu()), dtype)
    assert torch.equal(fused.add_norm(x.to(device), None, norm)[0].cpu(), x)
    close_enough(fused.silu_mul(gate_up.to(device)), gated(gate_up), dtype)
    qkv, _, _, angles = heads_and_angles(tokens, 32, 8, 128, dtype)
    cos, sin = (torch.cat([part(angles)] * 2, dim=1)[:, None].to(device, dtype) for part in (torch.cos, torch.sin))
    q, k = fused.rotate(*qkv.to(device, copy=True).split([32, 8, 8], dim=1)[:2], cos, sin)
    exact = turned(qkv[:, :40], angles)
    close_enough(torch.cat([q, k], dim=1), exact, dtype)
    scales = 1 + random(tokens, 1, 1, seed=3).abs().to(dtype)
    q, k = fused.rotate(*qkv.to(device, copy=True).split([32, 8, 8], dim=1)[:2], cos, sin, scales.to(device))
    exact[:, :32] *= scales.double()
    close_enough(torch.cat([q, k], dim=1), exact, dtype)


def close_enough(found, exact, dtype):
    """Plain torch rounds bfloat16 at every step: three roundings of numbers of the size of the largest."""
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype] * exact.abs().max().item()
    torch.testing.assert_close(found.cpu().double(), exact, atol=tolerance, rtol=0)


@pytest.mark.gpu
def test_a_card_that_torch_came_with_triton_for_uses_it():
    assert triton_support.available(torch.device("cuda")), triton_support.why_not()


def test_a_gradient_flows_through_every_operation():
    norm = nn.RMSNorm(8)
    x, delta = random(3, 8).requires_grad_(), random(3, 8, seed=1).requires_grad_()
    rotary = random(3, 1, 8), random(3, 1, 8), random(3, 1, 1)
    q, k = fused.rotate(random(3, 2, 8).requires_grad_(), x[:, None], *rotary)
    (fused.add_norm(x, delta, norm)[1].sum() + fused.silu_mul(x).sum() + q.sum() + k.sum()).backward()
    assert all(float(each.grad.abs().sum()) > 0 for each in (x, delta, norm.weight))


def test_a_card_without_triton_says_so_once_and_names_the_reason(monkeypatch, caplog):
    monkeypatch.setattr(triton_support, "_reasons", {})
    monkeypatch.setattr(triton_support, "_try", lambda device: "RuntimeError: Failed to find C compiler.")
    device = torch.device("cuda:0")
    assert not triton_support.available(device) and not triton_support.available(device)
    assert triton_support.why_not() == "RuntimeError: Failed to find C compiler."
    (record,) = caplog.records
    assert record.name == "pixtral_cli.model" and "Failed to find C compiler" in record.getMessage()


def test_a_cpu_needs_no_triton_and_gives_no_reason(monkeypatch):
    monkeypatch.setattr(triton_support, "_reasons", {})
    assert not triton_support.available(CPU) and triton_support.why_not() is None


def test_a_kernel_that_cannot_run_is_a_reason_in_one_line():
    reason = triton_support._try(torch.device("meta"))
    assert reason and "\n" not in reason


@interpreted
def test_the_trial_counts():
    from pixtral_cli.model import triton_trial

    assert triton_trial.counted(CPU).tolist() == [*range(1, triton_trial.SIZE + 1)]


def test_only_files_of_kernels_import_triton():
    """At their top: everything else must work without it, and quickly."""
    package = Path(fused.__file__).parent
    importing = {file.name for file in package.rglob("*.py") if "\nimport triton" in file.read_text()}
    assert {"fused_triton.py", "triton_trial.py"} <= importing and "fused.py" not in importing
