"""A weight in, what multiplies with it out: the registry of kernels. Knows no model.

A kernel is a class in a file of its own here: it holds one weight in the order that it reads, and has products of
activations with it, each for a number of rows. Letters: N rows of x (tokens), C columns (inputs), R rows of the weight
(outputs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from pixtral_cli.model.kernels.cpu_rows import CpuRowsKernel
from pixtral_cli.model.kernels.cuda_packed import CudaPackedKernel
from pixtral_cli.model.kernels.gemv import GemvKernel
from pixtral_cli.model.kernels.nf4 import NF4Kernel
from pixtral_cli.model.kernels.reference import ReferenceKernel
from weights_cache.packed import PackedWeight

Weight = Tensor | PackedWeight
Product = Callable[[Tensor], Tensor]


class Kernel(Protocol):
    """`weight` is [R, C] in the order that the kernel reads; nothing of it is lost, for it is what is saved.

    `products` take x [N, C] to x W^T [N, R]: the key is the number of rows from which on a product is used, and 1 is
    among the keys. What a kernel holds beside its weight is counted in `memory.card_kernel_bytes`; on a CPU it
    is nothing.
    """

    @property
    def weight(self) -> Weight: ...

    @property
    def products(self) -> Mapping[int, Product]: ...

    def __init__(self, weight: Weight, device: torch.device) -> None: ...

    @classmethod
    def takes(cls, weight: Weight, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it can multiply activations of `dtype` on `device` with such a weight."""
        ...


KERNELS: list[type[Kernel]] = [CudaPackedKernel, CpuRowsKernel, NF4Kernel, GemvKernel, ReferenceKernel]
"""In order of preference. The reference takes every packed weight on every device."""


def choose(weight: Weight, dtype: torch.dtype, device: torch.device) -> type[Kernel] | None:
    """The first kernel that takes the weight; None where torch's own linear layer is to multiply with a tensor."""
    return next((kernel for kernel in KERNELS if kernel.takes(weight, dtype, device)), None)


class KernelLinear(nn.Module):
    """y = x W^T + b, by the kernel's product for so many rows."""

    def __init__(self, kernel: Kernel, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.kernel = kernel
        self.bias = bias
        self._most_rows_first = sorted(kernel.products.items(), reverse=True)

    @property
    def weight(self) -> Weight:
        return self.kernel.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C] -> [N, R]."""
        rows = len(x)
        for least, product in self._most_rows_first:
            if rows >= least:
                y = product(x)
                return y if self.bias is None else y + self.bias
        return x.new_empty(0, self.weight.shape[0])  # no kernel is asked for no rows: bitsandbytes divides by them

    def extra_repr(self) -> str:
        return f"{type(self.kernel).__name__}, shape={tuple(self.weight.shape)}"
