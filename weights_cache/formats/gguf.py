"""A GGUF file in, its checked metadata and its tensors out, mapped or decoded. Knows no model and no names' meaning.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little-endian: "GGUF", version,
tensor count, metadata count; the metadata as (key, type, value); for each tensor its name, dimensions (the row
first), type and offset; padding; the data. A count is compared with the bytes that are left before anything is made
of it, so that a lying file costs no memory.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_cache import weight_files
from weights_cache.encodings import ENCODINGS, GGML, GGML_NOT_READ
from weights_cache.errors import CheckpointCorrupt, NotYetSupported
from weights_cache.file_kind import GGUF_MAGIC

from .reader import Entry, TensorInfo, map_file, mapped_tensor, release

if TYPE_CHECKING:
    import torch

    from weights_cache.packed import PackedWeight

VERSIONS = (2, 3)
LEAST_BYTES = 24
MAX_NAME_BYTES = 65_535  # the format's limit for a key
MAX_TEXT_BYTES = 2**26  # a chat template has some thousands
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
LEAST_PAIR = 8 + 4 + 1  # bytes of the shortest metadata entry, and of the shortest tensor's
LEAST_TENSOR = 8 + 4 + 8 + 4 + 8

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Metadata type -> its letter in `struct`."""
FLOAT32, STRING, ARRAY = 6, 8, 9


class GgufFile:
    """One GGUF, mapped into memory at once and read only where it is touched.

    One in several files (`name-00001-of-00003.gguf`, as llama.cpp splits them) is opened by the first, with its
    metadata. Raises CheckpointCorrupt when a header contradicts itself or the file's length, or a file is missing,
    and NotYetSupported for a version or a tensor type that cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._parts = [Header(each) for each in weight_files.gguf_shards(path)]
        self._part_of: dict[str, Header] = {}
        for part in self._parts:
            for name in part.entries:
                if first := self._part_of.get(name):
                    raise CheckpointCorrupt(part.path, f"tensor {name[:200]!r} is in {first.path} as well")
                self._part_of[name] = part
        self._check_split()

    @property
    def metadata(self) -> Metadata:
        """The file's keys -> numbers, texts and lists."""
        return self._parts[0].metadata

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The file's own names -> TensorInfo, in the order of the header."""
        return {name: part.entries[name].info for name, part in self._part_of.items()}

    def weight(self, name: str) -> torch.Tensor | PackedWeight:
        """The tensor `name`, sharing the file's mapping; what is packed and no matrix is decoded to float32."""
        import torch

        from weights_cache.packed import PackedRows

        part = self._part_of[name]
        entry, shape = part.entries[name], part.entries[name].info.shape
        encoding = ENCODINGS[entry.info.encoding]
        if not encoding.packed:
            return mapped_tensor(part.buffer, entry.begin, getattr(torch, encoding.name), shape)
        packed = (math.prod(shape[:-1]), encoding.row_bytes(shape[-1]))
        weight = PackedRows(encoding.name, mapped_tensor(part.buffer, entry.begin, torch.uint8, packed))
        return weight if len(shape) == 2 else weight.decoded().view(shape)

    def release(self, name: str) -> None:
        """Give back the memory that reading the tensor `name` has taken."""
        part = self._part_of[name]
        release(part.buffer, part.entries[name])

    def _check_split(self) -> None:
        """Whether the files are as many, and hold as many tensors, as the first says."""
        files, tensors = (self.metadata.get(f"split.{key}") for key in ("count", "tensors.count"))
        if files not in (None, 0, len(self._parts)):
            raise CheckpointCorrupt(self.path, f"it is one of {files} files, whose names should end in -00001-of-…")
        if len(self._parts) > 1 and tensors not in (None, len(self._part_of)):
            reason = f"it promises {tensors} tensors, and its files have {len(self._part_of)}"
            raise CheckpointCorrupt(self.path, reason)


class Header:
    """What stands before the data of one GGUF file, which is mapped. Raises CheckpointCorrupt or NotYetSupported."""

    def __init__(self, path: Path):
        self.path = path
        self.buffer = map_file(path, LEAST_BYTES, "GGUF")
        cursor = _Cursor(path, self.buffer)
        tensors, pairs = _counts(cursor)
        values = _unique(cursor, ((cursor.name(), _value(cursor)) for _ in range(pairs)), "metadata key")
        self.metadata = Metadata(values)
        described = _unique(cursor, (_described(cursor) for _ in range(tensors)), "tensor")
        alignment = _alignment(path, self.metadata)
        data = -(-cursor.at // alignment) * alignment
        self.entries = {name: _entry(path, name, found, data, alignment) for name, found in described.items()}
        _check_layout(path, self.entries, len(self.buffer))


class Metadata(Mapping[str, Any]):
    """Keys -> numbers, bools, texts, and lists of one of them; a list is made when it is asked for."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values
        self._lists: dict[str, list[Any]] = {}

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if not isinstance(value, _List):
            return value
        if key not in self._lists:
            self._lists[key] = value.items()
        return self._lists[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _Cursor:
    """Goes forward through untrusted bytes; reaching past their end is an error, before anything is read."""

    def __init__(self, path: Path, buffer: mmap.mmap):
        self.path, self.buffer, self.at = path, buffer, 0

    @cached_property
    def size(self) -> int:
        return len(self.buffer)

    @property
    def left(self) -> int:
        return self.size - self.at

    def corrupt(self, reason: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(self.path, reason)

    def pass_over(self, count: int) -> int:
        """Where the next `count` bytes begin."""
        begin = self.at
        if count > self.left:
            raise self.corrupt(f"its header goes on for {count} bytes at {begin}, and {self.left} follow")
        self.at = begin + count
        return begin

    def number(self, form: struct.Struct) -> Any:
        return form.unpack_from(self.buffer, self.pass_over(form.size))[0]

    def name(self) -> str:
        begin, end = self._text("its header has a name", MAX_NAME_BYTES)
        try:
            return self.buffer[begin:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"its header has a name that is no UTF-8 at {begin}") from error

    def text(self) -> str:
        begin, end = self._text("its metadata has a text", MAX_TEXT_BYTES)
        return self.buffer[begin:end].decode("utf-8", "replace")

    def _text(self, what: str, most: int) -> tuple[int, int]:
        """Where the bytes of a text begin and end."""
        length = self.number(U64)
        if length > most:
            raise self.corrupt(f"{what} of {length} bytes; at most {most} are allowed")
        return self.pass_over(length), self.at

    def many(self, count: int, least: int, what: str) -> int:
        """`count`, if so many things of at least `least` bytes can follow."""
        if count * least > self.left:
            raise self.corrupt(f"its header claims {count} {what}, and {self.left} bytes follow")
        return count


class _List:
    """A list in the metadata, whose place and length are checked and whose items are not read yet."""

    def __init__(self, cursor: _Cursor):
        self.kind = cursor.number(U32)
        if self.kind not in SCALARS and self.kind != STRING:
            raise cursor.corrupt(f"its metadata has a list of the unknown type {self.kind}")
        self.buffer = cursor.buffer
        form = SCALARS.get(self.kind)
        least = struct.calcsize(f"<{form}") if form else U64.size
        self.count = cursor.many(cursor.number(U64), least, "items in a list")
        self.begin = cursor.at
        if form:
            cursor.pass_over(self.count * least)
        else:
            cursor.at = self._end_of_texts(cursor)

    def _end_of_texts(self, cursor: _Cursor) -> int:
        """A vocabulary has some 100,000 texts, so this loop is spelled out."""
        at, last, length_at = self.begin, cursor.size - U64.size, U64.unpack_from
        for _ in range(self.count):
            if at > last:
                raise cursor.corrupt(f"a list of texts in its metadata reaches past its end at {at}")
            at += U64.size + length_at(self.buffer, at)[0]
        if at > cursor.size:
            raise cursor.corrupt(f"a list of texts in its metadata reaches past its end at {cursor.size}")
        return at

    def items(self) -> list[Any]:
        if form := SCALARS.get(self.kind):
            return list(struct.unpack_from(f"<{self.count}{form}", self.buffer, self.begin))
        found, at = [], self.begin
        for _ in range(self.count):
            begin = at + U64.size
            at = begin + U64.unpack_from(self.buffer, at)[0]
            found.append(self.buffer[begin:at].decode("utf-8", "replace"))
        return found


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """How many tensors and metadata entries there are, after the magic and the version."""
    begin = cursor.pass_over(len(GGUF_MAGIC))
    if cursor.buffer[begin : cursor.at] != GGUF_MAGIC:
        raise cursor.corrupt("it does not begin with GGUF")
    version = cursor.number(U32)
    if version not in VERSIONS:
        if version and not version & 0xFFFF:
            raise NotYetSupported(cursor.path, "a GGUF file for big-endian machines")
        if version == 1:
            raise NotYetSupported(cursor.path, "a GGUF file of version 1")
        raise cursor.corrupt(f"it says GGUF version {version}; {' and '.join(map(str, VERSIONS))} are known")
    tensors, pairs = cursor.number(U64), cursor.number(U64)
    cursor.many(pairs, LEAST_PAIR, "metadata entries")
    cursor.many(tensors, LEAST_TENSOR, "tensors")
    return tensors, pairs


def _unique(cursor: _Cursor, pairs: Iterator[tuple[str, Any]], what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise cursor.corrupt(f"the {what} {name[:200]!r} occurs twice")
        found[name] = value
    return found


def _value(cursor: _Cursor) -> Any:
    kind = cursor.number(U32)
    if kind == STRING:
        return cursor.text()
    if kind == ARRAY:
        return _List(cursor)
    if kind not in SCALARS:
        raise cursor.corrupt(f"its metadata has a value of the unknown type {kind}")
    value = cursor.number(struct.Struct(f"<{SCALARS[kind]}"))
    return _shortest(value) if kind == FLOAT32 else value


def _shortest(value: float) -> float:
    """The shortest decimal number that a float32 can stand for: 1e-05 rather than 9.999999747378752e-06."""
    if not math.isfinite(value):
        return value
    candidates = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    return next((found for found in candidates if _as_float32(found) == value), value)


def _as_float32(value: float) -> float | None:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return None


def _described(cursor: _Cursor) -> tuple[str, tuple[tuple[int, ...], int, int]]:
    """A tensor's name and (shape, type, offset); the file gives the row's length first, a shape last."""
    name = cursor.name()
    count = cursor.number(U32)
    if not 1 <= count <= MAX_DIMENSIONS:
        raise cursor.corrupt(f"tensor {name[:200]!r} has {count} dimensions, and 1 to {MAX_DIMENSIONS} are allowed")
    sizes = [cursor.number(U64) for _ in range(count)]
    return name, (tuple(reversed(sizes)), cursor.number(U32), cursor.number(U64))


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointCorrupt(path, f"its general.alignment is {str(alignment)[:40]}, which is no power of two")
    return alignment


def _entry(path: Path, name: str, described: tuple[tuple[int, ...], int, int], data: int, alignment: int) -> Entry:
    """One row of the tensor table, every field checked; `data` is where the tensors' bytes begin in the file."""

    def corrupt(reason: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(path, f"tensor {name[:200]!r} {reason}")

    shape, number, offset = described
    if number in GGML_NOT_READ:
        raise NotYetSupported(path, f"a GGUF file with a tensor ({name[:200]}) of type {GGML_NOT_READ[number]}")
    if number not in GGML:
        raise corrupt(f"has the unknown type {number}")
    encoding = GGML[number]
    if min(shape) < 1 or math.prod(shape) >= 2**63:
        raise corrupt(f"has the impossible shape {list(shape)}")
    if not encoding.fits(shape[-1]):
        raise corrupt(f"has rows of {shape[-1]}, and {encoding.word} needs a multiple of {encoding.block}")
    if offset % alignment:
        raise corrupt(f"lies at {offset}, which is no multiple of the alignment {alignment}")
    nbytes = math.prod(shape[:-1]) * encoding.row_bytes(shape[-1])
    return Entry(TensorInfo(name, encoding.word, shape, nbytes, path, encoding.name), data + offset)


def _check_layout(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    """No tensor may overlap another or reach past the file's end."""
    end, previous = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin < end:
            raise CheckpointCorrupt(path, f"tensor {name[:200]!r} overlaps {previous[:200]!r}")
        end, previous = entry.end, name
        if end > size:
            reason = f"it has {size} bytes, and tensor {name[:200]!r} reaches to {end}; it may be cut short"
            raise CheckpointCorrupt(path, reason)
