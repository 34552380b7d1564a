"""Positions in, what turns heads to them out: cosines and sines, and what queries far into a text are scaled by. Knows
no layers.

Rotations pair halves (x[i] with x[i + D/2]), the order of Hugging Face weights: one position for a token of text, two
for a patch of an image. Letters: N tokens or patches, D head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pixtral_cli.model.config import QueryScaling, TextConfig, Yarn

Rotary = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""cos and sin, each [N, 1, D]: what rotates the heads of N tokens or patches to their positions. Where queries are
scaled, by what: [N, 1, 1]."""
_KEPT: dict[tuple[int, float, torch.device, Yarn | None], Tensor] = {}
"""The frequencies of each kind of head, on each device."""


def text_rotary(positions: Tensor, config: TextConfig, dtype: torch.dtype) -> Rotary:
    """Integer positions [N], each within its own sequence -> what rotates the heads of these tokens, in `dtype`."""
    of_one = frequencies(config.head_dim, config.rope_theta, positions.device, config.yarn)
    cos, sin = cos_sin(positions.float()[:, None] * of_one, dtype, config.yarn.attention_factor if config.yarn else 1.0)
    scaling = config.query_scaling
    if scaling is None or (positions.is_cpu and not positions.ge(scaling.length).any()):  # then all are 1
        return cos, sin
    return cos, sin, query_scales(positions, scaling).to(dtype)[:, None, None]


def query_scales(positions: Tensor, scaling: QueryScaling) -> Tensor:
    """Positions [N] -> float32 [N] (transformers `modeling_ministral3.py`)."""
    return 1 + scaling.beta * torch.log(1 + torch.floor(positions / scaling.length))


def frequencies(head_dim: int, theta: float, device: torch.device, yarn: Yarn | None = None) -> Tensor:
    """float32 [D/2]: theta^(-2i/D), the angles of position 1 (Su et al. 2021, RoFormer, section 3.2.2), or as `yarn`
    stretches them."""
    key = head_dim, theta, device, yarn
    if key in _KEPT:
        return _KEPT[key]
    with torch.inference_mode(False):  # so that passes that are being trained may use them too
        made = _frequencies(*key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # its memory is the graph's
        return made
    return _KEPT.setdefault(key, made)


def _frequencies(head_dim: int, theta: float, device: torch.device, yarn: Yarn | None) -> Tensor:
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if yarn is None:
        return 1.0 / wavelengths
    low, high = _blended(head_dim, theta, yarn)
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (yarn.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _blended(head_dim: int, theta: float, yarn: Yarn) -> tuple[float, float]:
    """From which frequency to which they pass over from kept to divided by the factor: those that turn `beta_fast` and
    `beta_slow` times in the original length (Peng et al. 2023, YaRN, section 3.2)."""

    def turning(times: float) -> float:
        return head_dim * math.log(yarn.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(yarn.beta_fast), turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else high + 0.001


def grid_angles(rows: int, columns: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angles of one image's patches in raster order, float32 [rows * columns, D/2].

    Even frequencies are the row's and odd ones the column's, laid out [rows, columns]
    (transformers `modeling_pixtral.py`, mistral-inference `rope.py`). A patch at row 2, column 3 with D = 4 and
    theta = 1e4 has the angles [2 * 1, 3 * 0.01].
    """
    by_row, by_column = frequencies(head_dim, theta, device).view(-1, 2).unbind(1)
    row = torch.arange(rows, dtype=torch.float32, device=device).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float32, device=device).repeat(rows)
    return torch.cat([row[:, None] * by_row, column[:, None] * by_column], dim=1)


def cos_sin(angles: Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Angles [N, D/2] -> (cos, sin), each [N, 1, D] in `dtype` and times `factor`, to share among the heads."""
    both = torch.cat([angles, angles], dim=-1)[:, None]
    if factor == 1.0:
        return both.cos().to(dtype), both.sin().to(dtype)
    return (both.cos() * factor).to(dtype), (both.sin() * factor).to(dtype)
