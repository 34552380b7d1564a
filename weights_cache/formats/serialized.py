"""Reads a serialized model: its manifest, its side files, its tensors, and whether all is as it was written.

A serialized model is a valid safetensors file: any safetensors tool opens it. Its metadata entry `pixtral` is the
`Manifest` as JSON; side files ("config.json", "tokenizer.json", …) are U8 tensors named `file/NAME`. The manifest says
each tensor's encoding and true shape. A packed matrix is stored as its parts (`PackedWeight.tensors`), row by row as
its codec has it: the first goes by the matrix's own name, the others by NAME.PART. The last tensor, `seal`, is the
SHA-256 of the header, which holds the SHA-256 of every other tensor: so no change goes unnoticed. But a seal does not
say that the writer meant well, so every field is checked here. serialized_writer.py writes such files.

Files of version 2, and those of version 1 in nf4, may have matrices in another order; older_orders.py puts them into
rows. What is written today is what a program for version 1 reads, and so is of that version; but a file with matrices
in fp8 is of version 3.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_cache import cache, file_kind
from weights_cache.encodings import ENCODINGS
from weights_cache.errors import CheckpointCorrupt, SerializedTooNew, WeightsNotFound
from weights_cache.json_fields import CheckpointFields, parse_json_object
from weights_cache.layout import FORMS, Form
from weights_cache.progress import Progress
from weights_cache.wording import listed

from . import older_orders
from .reader import TensorInfo
from .safetensors import SafetensorsFile

if TYPE_CHECKING:
    from torch import Tensor

    from weights_cache.packed import PackedWeight

VERSION, FP8_VERSION, NEWEST = 1, 3, 3
"""The version that is written, that of a file with matrices in fp8, and the newest that can be read."""
KEY = "pixtral"
FILE_PREFIX = "file/"
SEAL = "seal"
IN_PARTS = frozenset({*older_orders.ROWS_TOGETHER, "fp8"})
"""Encodings of matrices that may have other tensors beside them in the file, named after them."""


@dataclass(frozen=True)
class Manifest:
    """What a serialized model says of itself. `form` is the checkpoint's it came from, which decides how
    images are prepared; `tensors` gives each tensor's encoding and true shape."""

    model: str
    form: Form
    encoding: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    version: int = VERSION

    @classmethod
    def read(cls, path: Path, raw: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> Manifest:
        """The manifest `raw` of a file that has the tensors `stored`. Raises CheckpointCorrupt."""
        fields = CheckpointFields(raw, path)
        model, named, encoding = (fields.text(key, "") for key in ("model", "form", "encoding"))
        form = next((form for form in FORMS if form == named), None)
        if form is None:
            raise CheckpointCorrupt(path, f"its manifest names the form {named[:40]!r}, and there is none")
        described = raw.get("tensors")
        if not isinstance(described, dict):
            raise CheckpointCorrupt(path, "its manifest does not say what its tensors are")
        return cls(model, form, encoding, {name: _tensor(path, name, said, stored) for name, said in described.items()})


def _tensor(path: Path, name: str, said: Any, stored: Mapping[str, TensorInfo]) -> tuple[str, tuple[int, ...]]:
    """A tensor's encoding and true shape, if it is stored as they ask for."""

    def corrupt(reason: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(path, f"its manifest {reason} {name[:200]!r}")

    if name not in stored:
        raise corrupt("names a tensor that it does not hold:")
    encoding, shape = said if isinstance(said, list) and len(said) == 2 else (None, None)
    if not isinstance(encoding, str) or not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise corrupt("does not give an encoding and a shape of")
    if _stored_shape(stored[name], encoding, shape) != stored[name].shape:
        raise corrupt(f"gives {encoding[:40]!r} {str(shape)[:80]} for another content of")
    return encoding, tuple(shape)


def _stored_shape(info: TensorInfo, encoding: str, shape: list[int]) -> tuple[int, ...] | None:
    """How a tensor of that encoding and shape is stored: as it is, or packed as bytes; None for neither."""
    if encoding == info.encoding:
        return tuple(shape)
    kind = ENCODINGS.get(encoding)
    if kind is None or not kind.packed or info.dtype != "U8" or not shape:
        return None
    rows, columns = prod(shape[:-1]), shape[-1]
    if _is_in_older_order(info):
        return older_orders.codes_shape(encoding, rows, columns)
    return kind.stored_shape(rows, columns)


def _is_in_older_order(info: TensorInfo) -> bool:
    """Whether the bytes of a packed matrix do not lie row by row."""
    return len(info.shape) == 3


class SerializedFile:
    """An opened serialized model: header and seal checked, the rest as it is touched. A `Reader` of weights.

    Raises WeightsNotFound (no such file), CheckpointCorrupt (cut short, altered header) and SerializedTooNew.
    """

    def __init__(self, path: Path) -> None:
        if not os.path.isfile(path):
            raise WeightsNotFound(f"{path} is no file, so it", "model", "Check the path.")
        self.path = path
        self._file = SafetensorsFile(path)
        self.seal = hashlib.sha256(self._file.header_bytes).digest()
        """SHA-256 of the header: it names the whole content."""
        self.manifest, self._hashes = self._read_manifest()

    def _read_manifest(self) -> tuple[Manifest, dict[str, str]]:
        metadata = self._file.metadata.get(KEY)
        if metadata is None:
            advice = "Give a file that `pixtral export` wrote; other forms are opened by --model-path."
            raise WeightsNotFound(self.path, "manifest, so it is no serialized model", advice)
        raw = parse_json_object(self.path, metadata.encode(errors="surrogatepass"), "its manifest")
        version, stored = raw.get("version"), self._file.tensors
        if type(version) is not int:
            raise CheckpointCorrupt(self.path, f"its manifest has {str(version)[:40]!r} for a version")
        if not 1 <= version <= NEWEST:
            raise SerializedTooNew(self.path, version, NEWEST)
        if SEAL not in stored or self._file.raw(SEAL) != self.seal:
            raise CheckpointCorrupt(self.path, "its header was altered")
        hashes = raw.get("sha256")
        if not isinstance(hashes, dict) or hashes.keys() != stored.keys() - {SEAL}:
            raise CheckpointCorrupt(self.path, "its manifest does not have a hash for each of its tensors")
        return Manifest.read(self.path, raw, stored), hashes

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Our names -> TensorInfo with true shapes and encodings; a packed matrix has the bytes of all its parts."""
        found, stored = {}, self._file.tensors
        for name, parts in self._parts.items():
            encoding, shape = self.manifest.tensors[name]
            nbytes = sum(stored[part].nbytes for part in parts)
            found[name] = TensorInfo(name, stored[name].dtype, shape, nbytes, self.path, encoding)
        return found

    @cached_property
    def _parts(self) -> Mapping[str, list[str]]:
        """Our names -> the stored tensors that the weight is made of, the one of its own name first."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.manifest.tensors):
            matrix = name.rpartition(".")[0]
            if matrix in found and self.manifest.tensors[matrix][0] in IN_PARTS:
                found[matrix].append(name)
            else:
                found[name] = [name]
        return found

    def weight(self, name: str) -> Tensor | PackedWeight:
        """As it is stored, memory-mapped; a matrix in an older order is copied into rows. Raises CheckpointCorrupt when
        what belongs to a packed one is not there."""
        encoding, shape = self.manifest.tensors[name]
        stored = self._file.weight(name)
        if encoding == self._file.tensors[name].encoding:
            return stored
        from weights_cache import packed

        beside = {part.removeprefix(f"{name}."): self._file.weight(part) for part in self._parts[name][1:]}
        older = _is_in_older_order(self._file.tensors[name])
        make = older_orders.in_rows if older else packed.from_parts
        weight = make(encoding, (prod(shape[:-1]), shape[-1]), stored, beside)
        if weight is None:
            raise CheckpointCorrupt(self.path, f"what belongs to {name[:200]!r} is missing or of another size")
        if older:
            self.release(name)  # nobody needs the original beside the copy
        return weight if len(shape) == 2 else weight.decoded().view(shape)

    def release(self, name: str) -> None:
        """Give back the memory that reading the tensor has taken."""
        for part in self._parts[name]:
            self._file.release(part)

    @property
    def in_older_order(self) -> bool:
        """Whether matrices of the file do not lie row by row, so that reading them takes memory and time."""
        described = self.manifest.tensors.items()
        return any(
            encoding in IN_PARTS and _is_in_older_order(self._file.tensors[name]) for name, (encoding, _) in described
        )

    def read(self, name: str) -> bytes | None:
        """The side file `name`, or None."""
        stored = FILE_PREFIX + name
        return bytes(self._file.raw(stored)) if stored in self._file.tensors else None

    @property
    def file_names(self) -> list[str]:
        """The side files that it holds."""
        return [name.removeprefix(FILE_PREFIX) for name in self._file.tensors if name.startswith(FILE_PREFIX)]

    def altered(self, *, weights: bool = True, progress: Progress | None = None) -> list[str]:
        """The names of tensors whose bytes are not those that were written; reads the whole file, or without `weights`
        its side files only."""
        expected = {name: sha for name, sha in self._hashes.items() if weights or name.startswith(FILE_PREFIX)}
        sizes = {name: self._file.tensors[name].nbytes for name in expected}
        found, done = [], 0
        with ThreadPoolExecutor() as pool:  # hashing leaves Python to the others
            for name, sha in zip(expected, pool.map(self._hash, expected), strict=True):
                if sha != expected[name]:
                    found.append(name)
                done += sizes[name]
                if progress is not None:
                    progress("Checking", done, sum(sizes.values()))
        return found

    def _hash(self, name: str) -> str:
        return hashlib.sha256(self._file.raw(name)).hexdigest()

    def check(self, *, weights: bool = True, progress: Progress | None = None) -> None:
        """Check every hash, and remember that the file is whole; without `weights` those of side files, for this once.

        Raises CheckpointCorrupt naming what was altered.
        """
        if altered := [f"{name[:200]!r}" for name in self.altered(weights=weights, progress=progress)]:
            raise CheckpointCorrupt(self.path, f"{listed(altered)} {'was' if len(altered) == 1 else 'were'} altered")
        if weights:
            cache.write_stamp(self.path, self.seal)

    @property
    def known(self) -> bool:
        """Whether the file was written or checked on this machine and has not changed since."""
        return cache.is_stamped(self.path, self.seal)


class EmbeddedFile:
    """A side file inside the serialized file: what readers of side files need of a Path."""

    def __init__(self, model: Path, name: str, data: bytes) -> None:
        self.model, self.name, self.data = model, name, data

    def read_bytes(self) -> bytes:
        return self.data

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.data.decode(encoding)

    def __str__(self) -> str:
        return f"{self.name} in {self.model}"


def is_serialized(path: Path) -> bool:
    """Whether `path` is a safetensors file with a manifest. Raises CheckpointCorrupt for one whose header is wrong."""
    return path.is_file() and file_kind.of(path) == "safetensors" and KEY in SafetensorsFile(path).metadata


def verify_path(path: Path) -> SerializedFile:
    """Open a serialized model and check every hash, whatever is remembered of it."""
    file = SerializedFile(path)
    file.check()
    return file
