"""Encoding into bitsandbytes' NF4, and multiplying with it by its kernel for GPUs. Knows no checkpoint.

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

from weights_cache.codecs.nf4 import BLOCK, NESTED_BLOCK, NF4, TABLE
from weights_cache.packed import PackedWeight

ENCODED_AT_ONCE = 2**20  # weights: many more, and bitsandbytes spends its time on fresh memory


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
    """W [R, C] in NF4 on a GPU, multiplied in bfloat16 by bitsandbytes' kernels."""

    def __init__(self, weight: Tensor | PackedWeight, device: torch.device) -> None:
        assert isinstance(weight, NF4)
        self.weight = weight.to(device)
        self._state = self._quant_state()

    @property
    def products(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {1: self._product}

    @classmethod
    def takes(cls, weight: Tensor | PackedWeight, dtype: torch.dtype, device: torch.device) -> bool:
        return isinstance(weight, NF4) and weight.shape[1] % weight.block == 0 and device.type == "cuda"

    def _product(self, x: Tensor) -> Tensor:
        codes = self.weight.codes.view(-1, 1)
        return bitsandbytes().matmul_4bit(x.to(torch.bfloat16).contiguous(), codes, self._state).to(x.dtype)

    def _quant_state(self) -> Any:
        """What bitsandbytes wants to know of codes beside the codes."""
        weight, functional = self.weight, bitsandbytes().functional
        state = functional.QuantState(
            weight.absmax,
            shape=torch.Size(weight.shape),
            code=torch.tensor(TABLE, device=weight.absmax.device),
            blocksize=weight.block,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
        if weight.nested_absmax is None or weight.nested_quant_map is None or weight.nested_offset is None:
            return state
        state.state2 = functional.QuantState(
            weight.nested_absmax, code=weight.nested_quant_map, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        state.offset, state.nested = weight.nested_offset.view(()), True
        return state
