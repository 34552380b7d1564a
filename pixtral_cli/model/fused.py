"""Element-wise operations of decoder and tower, each in one pass over memory. Knows no layers.

Plain torch is the definition. A CUDA tensor takes the form in `fused_triton` where Triton works, one on a CPU that in
`native_ops` where the library is there, unless it is being trained: those have no gradient. Letters: N tokens or
patches, C hidden_size, H query heads, K key-value heads, D head_dim, F intermediate_size.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from pixtral_cli.model import native_ops, triton_support


def add_norm(x: Tensor, delta: Tensor | None, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    """The residual x [N, C] and what a layer adds to it -> (x + delta, norm(x + delta)); `delta` None adds nothing."""
    if _on_card(x):
        return _triton().add_norm(x, delta, norm.weight, norm.eps)
    if norm.eps is not None and native_ops.take(x, norm.weight, x if delta is None else delta):
        return native_ops.add_norm(x, delta, norm.weight, norm.eps)
    total = x if delta is None else x + delta
    return total, norm(total)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q [N, H, D] and k [N, K, D], which may be overwritten, rotated by (cos, sin) [N, 1, D]; then q times `scales`
    [N, 1, 1]."""
    if _on_card(q):
        return _triton().rotate(q, k, cos, sin, scales)
    if native_ops.take(q, k, cos, sin):
        q, k = native_ops.rotate(q, k, cos, sin)
        return q if scales is None else q.mul_(scales), k
    turned = _rotated(q, cos, sin)
    return turned if scales is None else turned * scales, _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def silu_mul(gate_up: Tensor) -> Tensor:
    """[N, 2 F], gate then up -> SiLU(gate) * up [N, F]."""
    if _on_card(gate_up):
        return _triton().silu_mul(gate_up)
    return gated(*gate_up.chunk(2, dim=1))


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, each [N, F]."""
    return native_ops.silu_mul(gate, up) if native_ops.take(gate, up) else silu(gate) * up


def _on_card(x: Tensor) -> bool:
    return x.is_cuda and not x.requires_grad and triton_support.available(x.device)


@cache
def _triton() -> ModuleType:
    """Imported late: a machine without a card need not have Triton."""
    from pixtral_cli.model import fused_triton

    return fused_triton
