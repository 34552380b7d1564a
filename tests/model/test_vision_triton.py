"""Attention within images in Triton, against a softmax in float64: interpreted, compiled, and on a card."""

from itertools import accumulate

import pytest
import torch
from support.interpreter import CARDS, compile_for, interpreted

HEADS = 2


def views(lengths, dim, dtype=torch.float32, heads=HEADS):
    """q, k, v [N, H, D] of one matrix, scores far apart, and where each image begins."""
    qkv = torch.randn(sum(lengths), 3 * heads, dim, generator=torch.Generator().manual_seed(0))
    qkv[:, :heads] *= 3
    return qkv.to(dtype).split(heads, 1), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def exact(q, k, v, lengths):
    of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    scores = torch.einsum("nhd,lhd->hnl", q.double(), k.double()) / q.shape[2] ** 0.5
    weights = scores.masked_fill(of[:, None] != of[None], -torch.inf).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, v.double())


@interpreted
@pytest.mark.parametrize("dim", [16, 32])
@pytest.mark.parametrize("lengths", [[5], [16, 32], [40, 3, 33, 1]], ids=str)
def test_each_patch_sees_those_of_its_image(lengths, dim):
    """Blocks of 16: images that fill them, and that do not."""
    from pixtral_cli.model import vision_triton

    (q, k, v), starts = views(lengths, dim)
    found = vision_triton.attend_within(q, k, v, starts, max(lengths), vision_triton.Blocks(16, 16, 4, 2))
    torch.testing.assert_close(found.double(), exact(q, k, v, lengths), atol=1e-5, rtol=0)


@pytest.mark.parametrize("card", CARDS)
def test_the_kernel_compiles_for_every_card(card):
    vision_triton = pytest.importorskip("pixtral_cli.model.vision_triton")
    blocks = vision_triton.Blocks()
    signature = {
        **dict.fromkeys(("q", "k", "v", "out"), "*bf16"),
        **dict.fromkeys(("q_token", "k_token", "v_token", "q_head", "k_head", "v_head"), "i32:16"),
        "starts": "*i32",
        "scale": "fp32",
    }
    constants = {"heads": 16, "dim": 64, "rows": blocks.rows, "keys": blocks.keys, "stages": blocks.stages}
    compiled = compile_for(
        card, vision_triton._within, signature, {**constants, "chained": card >= 90}, blocks.warps, blocks.stages
    )
    assert compiled.asm["cubin"]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("lengths", [[1000], [256, 256, 256], [700, 3, 129, 64]], ids=str)
def test_a_card_computes_the_same(lengths, dim):
    from pixtral_cli.model import vision_triton

    (q, k, v), starts = views(lengths, dim, torch.bfloat16, heads=4)
    qkv = torch.cat([q, k, v], 1).cuda().split(4, 1)
    found = vision_triton.attend_within(*qkv, starts.cuda(), max(lengths)).cpu()
    wanted = exact(q, k, v, lengths)
    assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()
