"""A serialized model's file in, a Checkpoint out: with nothing else needed. Knows no model."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import layout, stamps
from .checkpoint import GENERATION_CONFIG, WRITTEN_TOKENIZER, Checkpoint
from .errors import CheckpointCorrupt, listed
from .json_fields import parse_json_object
from .reader import TensorInfo
from .serialized import Progress, SerializedFile

if TYPE_CHECKING:
    import torch

    from .int4 import Int4
    from .nf4 import NF4

SEVERAL = ("nf4", "q4_0", "q4_k")
"""Encodings of matrices that have other tensors beside them in the file, named after them."""


class SideFile:
    """A file inside the file: what readers of side files need of a Path."""

    def __init__(self, model: Path, name: str, data: bytes) -> None:
        self.model, self.name, self.data = model, name, data

    def read_bytes(self) -> bytes:
        return self.data

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.data.decode(encoding)

    def __str__(self) -> str:
        return f"{self.name} in {self.model}"


class SerializedCheckpoint(Checkpoint):
    """An opened serialized model. `encoding` is what it was saved in.

    A file that was neither written nor checked on this machine, or that has changed since, is read and checked
    against its hashes once, with steps to `progress`; for whoever reads no `weights`, its side files are.
    Raises CheckpointCorrupt and SerializedTooNew.
    """

    def __init__(self, path: Path, *, weights: bool = True, progress: Progress | None = None) -> None:
        self._file = SerializedFile(path)
        if not stamps.known(path, self._file.seal):
            _check(self._file, weights=weights, progress=progress)
        manifest = self._file.manifest
        super().__init__(path, self._json(layout.CONFIG) or {}, form=manifest.form)  # type: ignore[arg-type]
        self.written_tokenizer = self._json(WRITTEN_TOKENIZER)
        self.encoding = manifest.encoding
        self.model_name = manifest.model

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return self._json(GENERATION_CONFIG) or {}

    def file(self, name: str) -> Path | None:
        data = self._file.read(name)
        return None if data is None else SideFile(self.folder, name, data)  # type: ignore[return-value]

    def side_files(self) -> dict[str, bytes]:
        return {name: self._file.read(name) or b"" for name in self._file.file_names}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """A matrix in one of SEVERAL is one tensor here."""
        found: dict[str, TensorInfo] = {}
        for name, info in sorted(self._file.tensors.items()):
            matrix = found.get(name.rpartition(".")[0])
            if matrix is not None and matrix.encoding in SEVERAL:
                found[matrix.name] = replace(matrix, nbytes=matrix.nbytes + info.nbytes)
            else:
                found[name] = info
        return found

    def tensor(self, name: str) -> "torch.Tensor":
        info = self._file.tensors[name]
        if info.encoding == "nf4":
            return self.nf4(name).decode()
        if info.dtype != "U8":
            return self._file.tensor(name)
        from . import codecs

        return codecs.get(info.encoding).decode(self.packed(name))

    def nf4(self, name: str) -> "NF4":
        from .nf4 import NF4

        names = [each for each in self._file.tensors if each == name or each.startswith(f"{name}.")]
        parts = {each: self._file.tensor(each) for each in names}
        if not _fit(name, parts):
            raise self._incomplete(name)
        return NF4.from_tensors(name, parts)

    def int4(self, name: str) -> "Int4 | None":
        from .int4 import SCALES, Int4, stored_shapes

        info = self._file.tensors[name]
        if info.encoding == "nf4" or self._file.tensor(name).ndim != 3:
            return None
        parts = {each: self._file.tensor(each) for each in (name, name + SCALES) if each in self._file.tensors}
        if [tuple(part.shape) for part in parts.values()] != [*stored_shapes(info.encoding, *info.shape)]:
            raise self._incomplete(name)
        return Int4.from_tensors(name, info.encoding, parts)

    def packed(self, name: str) -> "torch.Tensor":
        """As `Checkpoint.packed`; what lies in the order of a kernel is put into rows, in memory."""
        ordered = self.int4(name)
        return self._file.packed(name) if ordered is None else ordered.rows()

    def release(self, name: str) -> None:
        for each in self._file.tensors:
            if each == name or each.startswith(f"{name}."):
                self._file.release(each)

    def _incomplete(self, name: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(self._file.path, f"what belongs to {name[:200]!r} is missing or of another size")

    def _json(self, name: str) -> dict[str, Any] | None:
        data = self._file.read(name)
        return None if data is None else parse_json_object(self._file.path, data, f"its {name}")


def _fit(name: str, parts: Mapping[str, "torch.Tensor"]) -> bool:
    """Whether the tensors beside a matrix's codes are those that its size asks for (see `nf4.NF4`)."""
    from .nf4 import BLOCKS, parts_beside

    found = {each.removeprefix(f"{name}."): (part.dtype, part.numel()) for each, part in parts.items() if each != name}
    blocks = found["absmax"][1] if "absmax" in found else 0
    possible = {-(-2 * parts[name].numel() // size) for size in BLOCKS}
    return blocks in possible and found == parts_beside(blocks, nested=len(found) > 1)


def _check(file: SerializedFile, *, weights: bool = True, progress: Progress | None = None) -> None:
    """Check every hash, and remember that the file is whole; without `weights` those of side files, for this once.

    Raises CheckpointCorrupt naming what was altered.
    """
    if altered := [f"{name[:200]!r}" for name in file.altered(weights=weights, progress=progress)]:
        raise CheckpointCorrupt(file.path, f"{listed(altered)} {'was' if len(altered) == 1 else 'were'} altered")
    if weights:
        stamps.remember(file.path, file.seal)


def verify_path(path: Path) -> SerializedFile:
    """Open a serialized model and check every hash, whatever is remembered of it."""
    file = SerializedFile(path)
    _check(file)
    return file
