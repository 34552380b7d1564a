"""What every file format offers: tensors by the file's own names, known before a byte of data is read.

Knows no format. A reader stands beside safetensors_reader.py and has the shape of `Reader`; checkpoint.py
chooses it and translates its names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor: `dtype` in the format's words ("BF16"), `shape`, `nbytes` in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path


class Reader(Protocol):
    """One opened weights file."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The file's own names -> TensorInfo."""

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor that the file calls `name`, memory-mapped where the format allows."""
