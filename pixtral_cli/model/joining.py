"""Matrices of a layer that multiply the same activations, multiplied together. Knows no checkpoint.

On a card they are made one matrix with the rows of all, for one product of many rows is quicker than several of few.
What each part was stays known under its name, so that a loaded model can be saved as it would be without. On a CPU
they stay in their mapped file, and one call of the library multiplies with all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from pixtral_cli.model import kernels
from pixtral_cli.model.kernels import KernelLinear, Weight
from pixtral_cli.model.kernels.cpu_rows import MANY, CpuRowsKernel, Together
from weights_cache import packed
from weights_cache.codecs.nf4 import NF4

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What `layers` calls the one matrix -> its parts, their rows in this order."""
_JOINED_IN = {part: joined for joined, parts in JOINED.items() for part in parts}


class SideBySide(nn.Module):
    """x W^T of several layers, one beside the other; the layers stay in their block, with their weights."""

    def __init__(self, kernels: Sequence[CpuRowsKernel]) -> None:
        super().__init__()
        self._together = Together(kernels)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C] -> [N, R], with R the rows of all."""
        return self._together.few(x) if 0 < len(x) < MANY else self._together.many(x)


def multiply_together(model: nn.Module) -> None:
    """Let the layers of a block that multiply the same x do it together, where the library multiplies all of them."""
    for block in model.modules():
        for joined, parts in JOINED.items():
            layers = [layer for part in parts if isinstance(layer := getattr(block, part, None), KernelLinear)]
            kernels = [layer.kernel for layer in layers if isinstance(layer.kernel, CpuRowsKernel)]
            if len(kernels) == len(parts) and all(layer.bias is None for layer in layers):
                setattr(block, joined, SideBySide(kernels))


class PartOf(nn.Module):
    """The rows [first, end) of a joined matrix, in the place of the linear layer that they were. Of nf4 with quantised
    magnitudes, `magnitudes` are what it has beside its codes."""

    def __init__(self, joined: nn.Module, first: int, end: int, magnitudes: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self._joined = (joined,)  # not registered: the layer has it already
        self._rows = first, end
        self._magnitudes = magnitudes

    @property
    def weight(self) -> Weight:
        """A view of a tensor, a copy of what is packed."""
        whole: Weight = self._joined[0].weight  # type: ignore[assignment]
        rows = packed.rows_of(whole, *self._rows)
        return NF4(rows.codes, **self._magnitudes) if isinstance(rows, NF4) and self._magnitudes else rows


def groups(names: Sequence[str]) -> Iterator[list[str]]:
    """The names of parameters, those together whose matrices can be joined, in the order of their rows: none with a
    bias, which would have to be added to its part."""
    left = dict.fromkeys(names)
    while left:
        name = next(iter(left))
        beside = [name] if name.removesuffix("weight") + "bias" in left else _beside(name)
        group = [each for each in beside if each in left]
        yield group
        for name in group:
            del left[name]


def _beside(name: str) -> list[str]:
    """The names of all parts of the matrix that `name` is joined in; itself if it is in none."""
    block, part = _block_and_part(name)
    return [f"{block}.{each}.weight" for each in JOINED[_JOINED_IN[part]]] if part in _JOINED_IN else [name]


def _block_and_part(name: str) -> tuple[str, str]:
    """Of layers.3.mlp.up_proj.weight: layers.3.mlp and up_proj."""
    block, _, part = name.removesuffix(".weight").rpartition(".")
    return block, part


def join(model: nn.Module, names: Sequence[str], weights: Sequence[Weight], dtype: torch.dtype) -> bool:
    """Give `model` one matrix in the place of those in a group of `names`, whose weights are on one device -> whether
    they can be joined: those of one encoding can."""
    plain = [weight.unnested() if isinstance(weight, NF4) else weight for weight in weights]
    whole = packed.joined(plain) if len(names) > 1 else None
    if whole is None:
        return False
    block, part = _block_and_part(names[0])
    joined = linear(whole, dtype)
    setattr(model.get_submodule(block), _JOINED_IN[part], joined)
    ends = list(accumulate(weight.shape[0] for weight in weights))
    for name, weight, first, end in zip(names, weights, [0, *ends], ends, strict=False):
        part_of = PartOf(joined, first, end, _magnitudes(weight))
        model.set_submodule(name.removesuffix(".weight"), part_of)
    return True


def _magnitudes(weight: Weight) -> dict[str, Tensor] | None:
    """What nf4 with quantised magnitudes has beside its codes."""
    if not isinstance(weight, NF4) or not weight.nested:
        return None
    return {name: part for name, part in weight.tensors().items() if name != "codes"}


def linear(weight: Weight, dtype: torch.dtype) -> nn.Module:
    """What multiplies activations of `dtype` with a weight where it lies: a kernel, or torch's own linear layer."""
    device = weight.device if isinstance(weight, Tensor) else next(iter(weight.tensors().values())).device
    if kernel := kernels.choose(weight, dtype, device):
        return KernelLinear(kernel(weight, device))
    assert isinstance(weight, Tensor), f"no kernel takes {weight.encoding}"
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
