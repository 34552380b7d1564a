"""Attention by its definition: the oracle of every other way to compute it."""

import torch
from torch import Tensor


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k^T / sqrt D) v in float64: q [N, H, D], k and v [L, K, D], `seen` bool [N, L] -> [N, H, D]."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q.double(), k) / q.shape[2] ** 0.5
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def same_image(lengths: list[int]) -> Tensor:
    """bool [N, N]: a patch sees those of its image."""
    image = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return image[:, None] == image
