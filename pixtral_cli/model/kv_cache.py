"""The keys and values of many sequences, in pages of one store, as they are or in 8 bits.

A sequence's token number t lies in slot `pages[t // PAGE] * PAGE + t % PAGE`. Which page belongs to whom is for others
to know. Letters: N tokens of one forward pass, S layers, T slots, K key-value heads, D head_dim, L tokens to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pixtral_cli.model import native_ops
from pixtral_cli.model.config import TextConfig

PAGE = 16  # tokens: what two prompts share is found in steps of this
LOWEST_EXPONENT, HIGHEST_EXPONENT = -60, 120
"""Of the scales of 8-bit numbers; the highest is what the largest float32 needs."""


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K, D] -> e4m3 codes [N, K, D] and int8 exponents [N, K], so that x is about codes * 2**exponents.

    A head's exponent is the smallest with which its largest magnitude is no more than 448, e4m3's largest number.
    """
    x = x.float()
    fraction, exponent = torch.frexp(x.abs().amax(-1))  # the peak is fraction * 2**exponent, fraction in [0.5, 1)
    exponent = exponent - 9 + (fraction > 448 / 512).int()
    exponent = exponent.clamp(LOWEST_EXPONENT, HIGHEST_EXPONENT)
    return (x * _power_of_two(-exponent)).to(torch.float8_e4m3fn), exponent.to(torch.int8)


def decode(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [..., D] and exponents [...] -> numbers [..., D]; exact in every dtype with float32's range."""
    return (codes.float() * _power_of_two(exponents)).to(dtype)


def _power_of_two(exponents: Tensor) -> Tensor:
    """[...] -> float32 [..., 1], exactly, which not every device's `pow` promises."""
    return ((exponents.int() + 127) << 23).view(torch.float32)[..., None]


class LayerStore(NamedTuple):
    """One layer's part of the store: keys and values [T, K, D]; of codes (uint8) also the exponents int8 [T, K]."""

    keys: Tensor
    values: Tensor
    key_exponents: Tensor | None
    value_exponents: Tensor | None


class KVCache:
    """Room for `pages` pages of keys and values, [2, S, T, K, D].

    `kv_cache_dtype` "fp8" keeps e4m3 codes and, [2, S, T, K], a power of two for each token and head. On a CPU memory
    is taken as pages are first written, not before. On a card there is one page more, number `scratch_page`: rows of a
    step that stand for nobody write there.
    """

    def __init__(
        self, config: TextConfig, dtype: torch.dtype, device: torch.device, pages: int, kv_cache_dtype: str = "auto"
    ) -> None:
        self.dtype = dtype
        self.scratch_page = None if device.type == "cpu" else pages
        slots = (pages + (self.scratch_page is not None)) * PAGE
        shape = (2, config.num_layers, slots, config.num_kv_heads, config.head_dim)
        coded = kv_cache_dtype == "fp8"
        self._store = torch.empty(shape, dtype=torch.uint8 if coded else dtype, device=device)
        self._exponents: Tensor | None = None
        if coded:
            self._exponents = torch.empty(shape[:-1], dtype=torch.int8, device=device)
        if self.scratch_page is not None:
            for part in (self._store, self._exponents):
                if part is not None:
                    part[:, :, -PAGE:] = 0
        self._layers = [
            LayerStore(
                *self._store[:, layer], *((None, None) if self._exponents is None else self._exponents[:, layer])
            )
            for layer in range(config.num_layers)
        ]

    def layer(self, layer: int) -> LayerStore:
        return self._layers[layer]

    @cached_property
    def addresses(self) -> tuple[int, int, int] | None:
        """Of the first layer's keys and values, and the bytes from one layer's to the next one's; None of codes, and
        on a card."""
        if self._exponents is not None or self._store.device.type != "cpu":
            return None
        return self._store[0].data_ptr(), self._store[1].data_ptr(), self._store.stride(1) * self._store.element_size()

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [N, K, D] into `slots` [N]."""
        if self._exponents is None and native_ops.take(k, v, self._store):
            native_ops.write(self._layers[layer].keys, self._layers[layer].values, slots, k, v)
            return
        for side, x in enumerate((k, v)):
            if self._exponents is None:
                self._store[side, layer].index_copy_(0, slots, x)
            else:
                codes, exponents = encode(x)
                self._store[side, layer].index_copy_(0, slots, codes.view(torch.uint8))
                self._exponents[side, layer].index_copy_(0, slots, exponents)

    def read(self, layer: int, where: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [K, L, D] of the L slots `where`: views of a slice, copies of others and of codes."""
        keys, values, key_exponents, value_exponents = self._layers[layer]
        return self._decoded(keys, key_exponents, where), self._decoded(values, value_exponents, where)

    def _decoded(self, store: Tensor, exponents: Tensor | None, where: slice | Tensor) -> Tensor:
        x = _at(store, where)
        if exponents is not None:
            x = decode(x.view(torch.float8_e4m3fn), _at(exponents, where), self.dtype)
        return x.transpose(0, 1)


def _at(x: Tensor, where: slice | Tensor) -> Tensor:
    return x[where] if isinstance(where, slice) else x.index_select(0, where)


@dataclass(frozen=True)
class Layout:
    """Where the N new tokens of a step on a card lie; tensors are int32 on the card.

    The first `decoding` tokens are the only new ones of their sequences, unless they are `successive`; those after them
    belong to S sequences, in order. Token n goes to slot `page_table[rows[n], positions[n] // PAGE] * PAGE +
    positions[n] % PAGE`. What stands for nobody has its place as well: a decoding row position 0 in the scratch page,
    tokens after the last prompt a sequence of their own whose pages are all the scratch page.
    """

    page_table: Tensor
    """[sequences, most pages of one]"""
    rows: Tensor
    """[N]: each token's row of `page_table`"""
    positions: Tensor
    """[N]: each token's place in its sequence"""
    decoding: int
    prefill_rows: Tensor | None = None
    """[S]: rows of `page_table`"""
    before: Tensor | None = None
    """[S]: tokens in the cache before the new ones"""
    starts: Tensor | None = None
    """[S + 1]: where each sequence's new tokens begin, counted from the first that is not decoding; their number"""
    successive: bool = False
    """whether tokens that decode may follow one another in a sequence"""
