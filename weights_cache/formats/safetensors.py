"""A safetensors file in, checked headers and memory-mapped tensors out. Knows no model and no names' meaning.

The format: 8 bytes of little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, the data
(https://huggingface.co/docs/safetensors). Nothing in the header is believed before it is checked.
"""

import math
import mmap
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from weights_cache.errors import CheckpointCorrupt, WeightsNotFound
from weights_cache.file_kind import GGUF_MAGIC, MAX_HEADER_BYTES
from weights_cache.json_fields import parse_json_object

from .reader import Entry, TensorInfo, map_file, mapped_tensor, release

if TYPE_CHECKING:
    import torch

LENGTH_BYTES = 8
MAX_DIMENSION = 2**63 - 1

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
    "I16": ("int16", 2), "U16": ("uint16", 2), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I32": ("int32", 4), "U32": ("uint32", 4), "F32": ("float32", 4),
    "I64": ("int64", 8), "U64": ("uint64", 8), "F64": ("float64", 8),
}  # fmt: skip
"""Each dtype that a header may name -> its name in torch, and the bytes of a number. Reading headers needs no torch."""

E4M3 = "F8_E4M3"

WORDS: Mapping[str, str] = {torch_name: word for word, (torch_name, _) in DTYPES.items()}


class SafetensorsFile:
    """One file, mapped into memory at once and read only where it is touched.

    Tensors to be `left_out` are passed over. Raises CheckpointCorrupt with the reason when the header contradicts
    itself or the file's length.
    """

    def __init__(self, path: Path, left_out: Collection[str] = ()):
        self.path = path
        self._buffer = map_file(path, LENGTH_BYTES, "safetensors")
        self.header_bytes = _header_bytes(path, self._buffer)
        """The header's JSON as it stands in the file, its padding included."""
        header = parse_json_object(path, self.header_bytes, "its header")
        metadata = header.pop("__metadata__", None)
        texts = metadata.items() if isinstance(metadata, dict) else ()
        self.metadata = {key: value for key, value in texts if isinstance(value, str)}
        """The header's `__metadata__`: what is not text in it is left out."""
        data = LENGTH_BYTES + len(self.header_bytes)
        entries = {name: _entry(path, name, described, data) for name, described in header.items()}
        _check_layout(path, entries, data, len(self._buffer))
        self._entries = {name: entry for name, entry in entries.items() if name not in left_out}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The file's own names -> TensorInfo, in the order of the header."""
        return {name: entry.info for name, entry in self._entries.items()}

    def weight(self, name: str) -> "torch.Tensor":
        """The tensor `name`, sharing the file's mapping (see `mapped_tensor`)."""
        import torch

        entry = self._entries[name]
        return mapped_tensor(self._buffer, entry.begin, getattr(torch, entry.info.encoding), entry.info.shape)

    def raw(self, name: str) -> memoryview:
        """The bytes of the tensor `name`, sharing the file's mapping, without torch."""
        entry = self._entries[name]
        return memoryview(self._buffer)[entry.begin : entry.end]

    def release(self, name: str) -> None:
        """Give back the memory that reading the tensor `name` has taken."""
        release(self._buffer, self._entries[name])


def _header_bytes(path: Path, buffer: mmap.mmap) -> bytes:
    if buffer[: len(GGUF_MAGIC)] == GGUF_MAGIC:
        raise WeightsNotFound(path, "safetensors header: it is a GGUF file", "Give it to --model-path.")
    length = int.from_bytes(buffer[:LENGTH_BYTES], "little")
    room = len(buffer) - LENGTH_BYTES
    if length > room:
        raise CheckpointCorrupt(path, f"its header claims {length} bytes, and {room} follow; it may be cut short")
    if length > MAX_HEADER_BYTES:
        raise CheckpointCorrupt(path, f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return buffer[LENGTH_BYTES : LENGTH_BYTES + length]


def _entry(path: Path, name: str, described: Any, data: int) -> Entry:
    """One header entry, every field checked; `data` is where the tensors' bytes begin in the file."""

    def corrupt(reason: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(path, f"tensor {name[:200]!r} {reason}")

    if not isinstance(described, dict):
        raise corrupt("is not described by an object")
    dtype, shape, offsets = described.get("dtype"), described.get("shape"), described.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise corrupt(f"has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape):
        raise corrupt("has a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt("has offsets that are not a begin and an end")
    begin, end = offsets
    encoding, width = DTYPES[dtype]
    nbytes = math.prod(shape) * width
    if end - begin != nbytes:
        raise corrupt(f"of shape {shape} and dtype {dtype} needs {nbytes} bytes, and its offsets span {end - begin}")
    return Entry(TensorInfo(name, dtype, tuple(shape), nbytes, path, encoding), data + begin)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a short list of integers that fit into 63 bits (a bool is none)."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(item) is int and 0 <= item <= MAX_DIMENSION for item in value)
    )


def _check_layout(path: Path, entries: Mapping[str, Entry], data: int, size: int) -> None:
    """The tensors must fill the file from `data` to `size`, no gap, no overlap: the format demands it."""
    position, previous = data, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            fault = "overlaps" if entry.begin < position else "leaves a gap after"
            raise CheckpointCorrupt(path, f"tensor {name[:200]!r} {fault} {previous[:200]!r}")
        position, previous = entry.end, name
    if position > size:
        raise CheckpointCorrupt(path, f"it has {size} bytes, and its header describes {position}; it was cut short")
    if position < size:
        raise CheckpointCorrupt(path, f"it has {size} bytes, and its header describes only {position}")
