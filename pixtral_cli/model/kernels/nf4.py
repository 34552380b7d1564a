"""Linear layers in bitsandbytes' NF4: weights in and encoded, or encoded ones in, products out. Knows no checkpoint.

bitsandbytes is imported when the first layer is made, and only what multiplies and encodes of it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from weights_cache.codecs.nf4 import BLOCK, NESTED_BLOCK, NF4, ROWS, TABLE

ENCODED_AT_ONCE = 2**20  # weights: many more, and bitsandbytes spends its time on fresh memory
FUSED_TOKENS = 64  # tokens from which on decoding the weights once is quicker than the kernel for few tokens
TILE = 1024  # rows decoded at a time: a multiple of ROWS


@cache
def bitsandbytes() -> ModuleType:
    """The package, imported in a tenth of a second: it takes four when it brings torch's compiler along."""
    with _without_extras():
        import bitsandbytes
    return bitsandbytes


@contextmanager
def _without_extras() -> Iterator[None]:
    """Keep bitsandbytes from bringing in torch's compiler, which is never run here, and from fetching a kernel from
    the Hub, which it does unasked where the package `kernels` is installed; it has one of its own."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("not compiled")  # bitsandbytes then takes the plain function

    with (
        _replaced(vars(torch), "compile", refuse),
        _replaced(vars(torch), "_disable_dynamo", lambda kernel: kernel),  # else a kernel's first call imports it
        _replaced(sys.modules, "kernels", None),
        _replaced(vars(logging.getLogger("bitsandbytes.backends.cpu.ops")), "disabled", True),  # "could not fetch"
    ):
        yield


@contextmanager
def _replaced(names: dict[str, Any], name: str, value: object) -> Iterator[None]:
    before, absent = names.get(name), name not in names
    names[name] = value
    try:
        yield
    finally:
        if absent:
            del names[name]
        else:
            names[name] = before


@torch.no_grad()
def encode(weight: Tensor, double: bool = False) -> NF4:
    """`weight`, floats [R, C], in NF4, exactly as bitsandbytes' `quantize_4bit` does it; C must be even.

    `double` quantises the blocks' magnitudes too: 4.13 bits a weight instead of 4.5.
    """
    functional = bitsandbytes().functional
    assert weight.shape[1] % 2 == 0, f"rows of {weight.shape[1]} weights do not fill whole bytes"
    codes, magnitudes = [], []
    for part in weight.reshape(-1).split(ENCODED_AT_ONCE):
        packed, state = functional.quantize_4bit(part, blocksize=BLOCK, quant_type="nf4")
        codes.append(packed.view(-1))
        magnitudes.append(state.absmax)
    rows, absmax = torch.cat(codes).view(len(weight), -1), torch.cat(magnitudes)
    if not double:
        return NF4(rows, absmax)
    offset = absmax.mean()
    absmax, nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return NF4(rows, absmax, nested.absmax, nested.code, offset.view(1))


class NF4Linear(nn.Module):
    """y = x W^T + b with W [R, C] in NF4, computed in bfloat16 by bitsandbytes' kernels on the device of the weights.

    On a CPU that multiplies bfloat16 the weights are put into the order of its kernel, and the magnitudes rounded to
    bfloat16 for it. Matrices whose rows are no whole number of blocks are decoded here: bitsandbytes' decoder for
    the CPU (0.50.2) takes each row for whole blocks and gives wrong weights.
    """

    def __init__(self, weight: NF4, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.bias = bias
        rows, columns = self.shape = weight.shape
        self.whole = columns % weight.block == 0
        on_cpu = weight.codes.device.type == "cpu" and bitsandbytes().functional.has_avx512bf16()
        self.fused = bool(on_cpu and self.whole and rows % ROWS == 0)
        self.weight = weight.interleaved() if self.fused else weight.in_rows()
        self._state = self._kernel_state()

    def _kernel_state(self) -> Any:
        """The magnitudes as the kernel of this layer wants them."""
        weight = self.weight
        if self.fused:
            return self._state_of(weight.magnitudes().view(self.shape[0], -1).T.to(torch.bfloat16).contiguous())
        if weight.nested_absmax is None or weight.nested_quant_map is None or weight.nested_offset is None:
            return self._state_of(weight.absmax)
        state = self._state_of(weight.absmax)
        state.state2 = bitsandbytes().functional.QuantState(
            weight.nested_absmax, code=weight.nested_quant_map, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        state.offset, state.nested = weight.nested_offset.view(()), True
        return state

    def _state_of(self, absmax: Tensor, rows: int | None = None) -> Any:
        return bitsandbytes().functional.QuantState(
            absmax,
            shape=torch.Size((rows or self.shape[0], self.shape[1])),
            code=torch.tensor(TABLE, device=absmax.device),
            blocksize=self.weight.block,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C] -> [N, R]."""
        y = self._product(x.to(torch.bfloat16).contiguous()).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        package, codes = bitsandbytes(), self.weight.codes
        if not self.whole:
            return x @ self.weight.decoded(x.dtype).T
        if not self.fused:
            return package.matmul_4bit(x, codes.view(-1, 1), self._state)
        if len(x) < FUSED_TOKENS:
            return package.functional.gemv_4bit(x, codes.view(self.shape[0], -1), state=self._state)
        return self._decoded_product(x)

    def _decoded_product(self, x: Tensor) -> Tensor:
        """Tile by tile of rows, each decoded once for all tokens."""
        y = x.new_empty(len(x), self.shape[0])
        magnitudes = self.weight.magnitudes().view(self.shape[0], -1)
        for start in range(0, self.shape[0], TILE):
            units = magnitudes[start : start + TILE]
            tile = NF4(self.weight.codes[start // ROWS : (start + TILE) // ROWS], units.flatten()).in_rows()
            state = self._state_of(tile.absmax, len(units))
            weights = bitsandbytes().functional.dequantize_4bit(tile.codes.view(-1, 1), state)
            y[:, start : start + TILE] = x @ weights.T
        return y

    def to_tensors(self, name: str) -> dict[str, Tensor]:
        """Everything but the bias as plain tensors, to make `NF4.from_tensors` of: nothing is encoded again."""
        return self.weight.to_tensors(name)

    def extra_repr(self) -> str:
        return f"nf4, rows={self.shape[0]}, columns={self.shape[1]}"
