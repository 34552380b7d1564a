"""Positions in, rotations out: 1-D rotary positions for the decoder, 2-D ones for the vision tower.

Both rotate halves (x[i] with x[i + D/2]), the order of Hugging Face weights. Letters: N tokens or patches,
D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """float32 [D/2]: theta^(-2i/D), Su et al. 2021 (RoFormer), section 3.2.2."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / theta**exponents


def text_angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Integer positions [N] -> float32 angles [N, D/2]."""
    return positions.float()[:, None] * frequencies(head_dim, theta, positions.device)


def grid_angles(rows: int, columns: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angles of one picture's patches in raster order, float32 [rows * columns, D/2].

    Even frequencies turn with the row and odd ones with the column, laid out [rows, columns]
    (transformers `modeling_pixtral.py`, mistral-inference `rope.py`). A patch at row 2, column 3 with D = 4 and
    theta = 1e4 has the angles [2 * 1, 3 * 0.01].
    """
    by_row, by_column = frequencies(head_dim, theta, device).view(-1, 2).unbind(1)
    row = torch.arange(rows, dtype=torch.float32, device=device).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float32, device=device).repeat(rows)
    return torch.cat([row[:, None] * by_row, column[:, None] * by_column], dim=1)


def rotation(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Angles [N, D/2] -> (cos, sin), each [N, 1, D] in `dtype`, to share among the heads."""
    both = torch.cat([angles, angles], dim=-1)[:, None]
    return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [N, heads, D] by (cos, sin) [N, 1, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
