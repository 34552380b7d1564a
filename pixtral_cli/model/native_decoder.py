"""Passes of a few rows through a decoder's layers in one call of the library in C (native/decoder.c), on a CPU.

`language_model.Decoder` is the definition, and computes whatever this does not take; the bits are the same. Letters: N
rows, C hidden_size, D head_dim.
"""

from __future__ import annotations

from ctypes import Structure, addressof, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pixtral_cli.model import native_ops
from pixtral_cli.model.attention import AttendPaged
from pixtral_cli.model.kernels import KernelLinear, native
from pixtral_cli.model.kernels.cpu_rows import MANY, NARROW, CpuRowsKernel
from pixtral_cli.model.kernels.native_matrix import Matrix
from pixtral_cli.model.layers import Attend
from pixtral_cli.model.rotary import Rotary

if TYPE_CHECKING:
    from pixtral_cli.model.language_model import Decoder, DecoderLayer


class Layer(Structure):
    """`struct layer`: where a layer's weights are. It keeps none of them."""

    _fields_ = (
        ("qkv", Matrix * 3),
        ("output", Matrix),
        ("gate_up", Matrix * 2),
        ("down", Matrix),
        ("input_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("window", c_int64),
    )


class Sizes(Structure):
    """`struct sizes`"""

    _fields_ = (
        ("type", c_int32),
        ("epsilon", c_float),
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "dim", "intermediate")),
    )


class Pass(Structure):
    """`struct pass`"""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "tokens")),
        *((name, c_void_p) for name in ("x", "delta", "cosines", "sines", "keys", "values")),
        ("layer_bytes", c_int64),
        *((name, c_void_p) for name in ("slots", "pages", "starts", "lengths", "memory")),
    )


class NativeDecoder:
    """The layers of a decoder whose weights lie as the library reads them. The decoder keeps this, and the weights."""

    def __init__(self, decoder: Decoder, layers: list[Layer]) -> None:
        config = decoder.config
        self._dtype = decoder.norm.weight.dtype
        self._layers = (Layer * len(layers))(*layers)
        self._sizes = Sizes(
            NARROW[self._dtype],
            config.norm_eps,
            len(layers),
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
        )
        heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
        self._numbers = config.hidden_size + heads + 3 * config.intermediate_size

    @classmethod
    def of(cls, decoder: Decoder) -> NativeDecoder | None:
        """None where the library is not there, or does not take the weights of each layer or its heads."""
        config = decoder.config
        if not native.available() or decoder.norm.weight.dtype not in NARROW:
            return None
        if not native_ops.attends(config.num_heads, config.head_dim):
            return None
        blocks = cast("list[DecoderLayer]", list(decoder.layers))
        layers = [_layer(*each) for each in zip(blocks, config.sliding_windows, strict=True)]
        known = [layer for layer in layers if layer is not None]
        return cls(decoder, known) if len(known) == len(layers) else None

    def __call__(self, x: Tensor, rotary: Rotary, attend: Attend) -> tuple[Tensor, Tensor] | None:
        """Embedded rows x [N, C] and their rotations [N, 1, D] -> the residual and what is to be added to it, as
        `DecoderLayer` gives them; None for a pass that this does not take, of which nothing was computed."""
        if len(x) >= MANY or x.dtype != self._dtype or torch.is_grad_enabled() or not isinstance(attend, AttendPaged):
            return None
        tokens = attend.ends
        if tokens is None or len(rotary) > 2:  # queries far into a text are scaled by torch
            return None
        cosines, sines = rotary
        x = x.clone(memory_format=torch.contiguous_format)  # a caller's own
        delta, memory = torch.empty_like(x), x.new_empty(len(x) * self._numbers)
        keys, values, layer_bytes = tokens.store
        rows = Pass(
            len(x), len(tokens.slots), x.data_ptr(), delta.data_ptr(), cosines.data_ptr(), sines.data_ptr(), keys,
            values, layer_bytes, tokens.slots.data_ptr(), tokens.pages.pages, tokens.pages.starts,
            tokens.pages.lengths, memory.data_ptr(),
        )  # fmt: skip
        _function()(addressof(self._layers), addressof(self._sizes), addressof(rows), native.threads())
        return x, delta


def _layer(layer: DecoderLayer, window: int | None) -> Layer | None:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    matrices = [_matrix(each) for each in (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    known = [matrix for matrix in matrices if matrix is not None]
    if len(known) < len(matrices):
        return None
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    q, k, v, output, gate, up, down = known
    return Layer(
        (Matrix * 3)(q, k, v), output, (Matrix * 2)(gate, up), down, *(norm.data_ptr() for norm in norms), window or 0
    )


def _matrix(layer: nn.Module) -> Matrix | None:
    if isinstance(layer, KernelLinear) and isinstance(layer.kernel, CpuRowsKernel) and layer.bias is None:
        return layer.kernel.matrix
    return None


@cache
def _function() -> Any:
    return native.function("pixtral_decoder_pass", c_void_p, c_void_p, c_void_p, c_int)
