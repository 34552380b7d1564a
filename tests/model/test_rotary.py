"""Rotary positions by themselves, against transformers' modules and rotations of complex numbers in float64."""

import pytest
import torch
from transformers import MistralConfig, PixtralVisionConfig
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.pixtral.modeling_pixtral import PixtralVisionRotaryEmbedding

from pixtral_cli.model.fused import rotate
from pixtral_cli.model.rotary import cos_sin, frequencies, grid_angles

CPU = torch.device("cpu")
HEAD_DIMS, THETAS = (16, 128), (1e4, 1e9)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def text_rotary(positions, head_dim, theta, dtype=torch.float32):
    """As the decoder has it."""
    return cos_sin(positions.float()[:, None] * frequencies(head_dim, theta, CPU), dtype)


def rotated_as_complex_numbers(x, angles):
    """x[i] + i x[i + D/2] times e^(i angle), for each pair of a head: Su et al. 2021 (RoFormer), equation 34."""
    first, second = x.double().chunk(2, dim=-1)
    complex_x = torch.complex(first, second) * torch.exp(1j * angles.double())[:, None]
    return torch.cat([complex_x.real, complex_x.imag], dim=-1)


def exact_angles(positions, head_dim, theta):
    """position * theta^(-2i/D) in float64."""
    return torch.tensor([[p * theta ** (-2 * i / head_dim) for i in range(head_dim // 2)] for p in positions])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("theta", THETAS)
def test_tokens_are_rotated_by_their_position(head_dim, theta):
    positions, x = [0, 1, 2, 77, 4095], random(5, 3, head_dim)
    found, found_k = rotate(x.clone(), x[:, :1].clone(), *text_rotary(torch.tensor(positions), head_dim, theta))
    wanted = rotated_as_complex_numbers(x, exact_angles(positions, head_dim, theta))
    torch.testing.assert_close(found.double(), wanted, atol=2e-3, rtol=0)  # 4095 in float32 is exact to 2^-12
    torch.testing.assert_close(found[:4].double(), wanted[:4], atol=5e-5, rtol=0)
    assert torch.equal(found[0], x[0]) and torch.equal(found_k, found[:, :1])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_rotations_are_those_of_transformers(head_dim, theta, dtype):
    positions = torch.tensor([0, 1, 13, 4095, 100_000])
    config = MistralConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    cos, sin = MistralRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions[None])
    found = text_rotary(positions, head_dim, theta, dtype)
    torch.testing.assert_close(found, (cos[0, :, None], sin[0, :, None]), atol=2e-7, rtol=0)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (7, 2)], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_grid_rotations_are_those_of_transformers(grid, head_dim):
    config = PixtralVisionConfig(hidden_size=4 * head_dim, num_attention_heads=4, image_size=256, patch_size=16)
    places = torch.cartesian_prod(*map(torch.arange, grid))  # [N, 2]
    cos, sin = PixtralVisionRotaryEmbedding(config)(torch.zeros(1), places)
    found = cos_sin(grid_angles(*grid, head_dim, 1e4, CPU), torch.float32)
    torch.testing.assert_close(found, (cos[:, None], sin[:, None]), atol=1e-6, rtol=0)


def test_even_frequencies_are_the_rows_and_odd_ones_the_columns():
    """Those of one dimension, shared out in turns: the sums of the formula, patch by patch."""
    head_dim, theta, columns = 16, 1e4, 4
    angles = grid_angles(3, columns, head_dim, theta, CPU)
    frequencies = exact_angles([1], head_dim, theta)[0]
    for patch, found in enumerate(angles):
        row, column = divmod(patch, columns)
        wanted = torch.cat([row * frequencies[0::2], column * frequencies[1::2]])
        torch.testing.assert_close(found.double(), wanted.double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [1, 1000])
def test_scores_depend_on_the_distance_alone(shift):
    q, k = random(1, 1, 64), random(2, 1, 64)[1:]

    def score(of_q, of_k):
        at = [text_rotary(torch.tensor([place]), 64, 1e6) for place in (of_q, of_k)]
        (turned, _), (_, turned_k) = (rotate(q.clone(), k.clone(), *each) for each in at)
        return (turned * turned_k).sum()

    torch.testing.assert_close(score(9 + shift, 4 + shift), score(9, 4), atol=2e-3, rtol=0)
    assert (score(9, 4) - score(9, 5)).abs() > 0.05
