"""Encoding into bitsandbytes' NF4, and multiplying with it by bitsandbytes' kernels. Knows no checkpoint.

bitsandbytes is imported when the first weight is encoded or multiplied with, and only what does that of it.
Letters: N rows of x, C columns, R rows of the weight.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from weights_cache.codecs.nf4 import BLOCK, NESTED_BLOCK, NF4, ROWS, TABLE
from weights_cache.packed import PackedWeight

ENCODED_AT_ONCE = 2**20  # weights: many more, and bitsandbytes spends its time on fresh memory
DECODED_FROM = 64  # rows of x, for which decoding the weights once is quicker than the kernel for few rows
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


class NF4Kernel:
    """W [R, C] in NF4, multiplied in bfloat16 by bitsandbytes' kernels, on the device of the weights.

    On a CPU that multiplies bfloat16 the weights are put into the order of its kernel, and the magnitudes rounded to
    bfloat16 for it. Matrices whose rows are no whole number of blocks are left to the reference: bitsandbytes' decoder
    for the CPU (0.50.2) takes each row for whole blocks and gives wrong weights.
    """

    def __init__(self, weight: Tensor | PackedWeight, device: torch.device) -> None:
        assert isinstance(weight, NF4)
        weight = weight.to(device)
        self.fused = bool(
            device.type == "cpu" and weight.shape[0] % ROWS == 0 and bitsandbytes().functional.has_avx512bf16()
        )
        self.weight = weight.interleaved() if self.fused else weight.in_rows()
        self._state = self._fused_state() if self.fused else self._plain_state()

    @property
    def products(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {1: self._fused, DECODED_FROM: self._decoded} if self.fused else {1: self._plain}

    @classmethod
    def takes(cls, weight: Tensor | PackedWeight, dtype: torch.dtype, device: torch.device) -> bool:
        return isinstance(weight, NF4) and weight.shape[1] % weight.block == 0

    def _fused(self, x: Tensor) -> Tensor:
        codes = self.weight.codes.view(self.weight.shape[0], -1)
        y = bitsandbytes().functional.gemv_4bit(x.to(torch.bfloat16).contiguous(), codes, state=self._state)
        return y.to(x.dtype)

    def _decoded(self, x: Tensor) -> Tensor:
        """Tile by tile of rows, each decoded once for all rows of x."""
        y = x.new_empty(len(x), self.weight.shape[0])
        magnitudes = self.weight.magnitudes().view(self.weight.shape[0], -1)
        for start in range(0, self.weight.shape[0], TILE):
            units = magnitudes[start : start + TILE]
            tile = NF4(self.weight.codes[start // ROWS : (start + TILE) // ROWS], units.flatten()).in_rows()
            state = self._state_of(tile.absmax, len(units))
            weights = bitsandbytes().functional.dequantize_4bit(tile.codes.view(-1, 1), state)
            y[:, start : start + TILE] = x.to(torch.bfloat16) @ weights.T
        return y

    def _plain(self, x: Tensor) -> Tensor:
        codes = self.weight.codes.view(-1, 1)
        return bitsandbytes().matmul_4bit(x.to(torch.bfloat16).contiguous(), codes, self._state).to(x.dtype)

    def _fused_state(self) -> Any:
        magnitudes = self.weight.magnitudes().view(self.weight.shape[0], -1)
        return self._state_of(magnitudes.T.to(torch.bfloat16).contiguous())

    def _plain_state(self) -> Any:
        weight, state = self.weight, self._state_of(self.weight.absmax)
        if weight.nested_absmax is None or weight.nested_quant_map is None or weight.nested_offset is None:
            return state
        state.state2 = bitsandbytes().functional.QuantState(
            weight.nested_absmax, code=weight.nested_quant_map, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        state.offset, state.nested = weight.nested_offset.view(()), True
        return state

    def _state_of(self, absmax: Tensor, rows: int | None = None) -> Any:
        """What bitsandbytes wants to know of codes beside the codes."""
        return bitsandbytes().functional.QuantState(
            absmax,
            shape=torch.Size((rows or self.weight.shape[0], self.weight.shape[1])),
            code=torch.tensor(TABLE, device=absmax.device),
            blocksize=self.weight.block,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
