"""Weights, side files and a name in, one serialized file out. Knows no model and no codec; serialized.py reads it.

A file takes its name only when it is whole, and where every byte will lie is known before the first weight is made:
so weights are made one at a time, and what does not fit on the disk is refused at once.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from weights_cache.errors import DiskFull, WriteFailed
from weights_cache.layout import Form
from weights_cache.progress import Progress

from .safetensors import LENGTH_BYTES, WORDS
from .serialized import FILE_PREFIX, FP8_VERSION, KEY, SEAL, Manifest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from weights_cache.packed import PackedWeight

SHA256_BYTES = hashlib.sha256().digest_size
ALIGNMENT = 64  # bytes; where the data begins
MAX_WIDTH = 4  # bytes of the widest dtype


@dataclass(frozen=True)
class Weight:
    """One weight to write. `make()` gives it when its turn comes.

    `parts` says before that what it is made of: the dtype and shape of a plain tensor, or of each of
    `PackedWeight.tensors`, in order.
    """

    name: str
    encoding: str
    shape: tuple[int, ...]
    parts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    make: Callable[[], Tensor | PackedWeight]

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors that stand for it in the file: the first part by its own name, the others by NAME.PART."""
        return {f"{self.name}.{part}" if at else self.name: kind for at, (part, kind) in enumerate(self.parts.items())}

    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What the manifest says of these: their encoding and true shape."""
        parts = {name: (str(dtype).removeprefix("torch."), shape) for name, (dtype, shape) in self.tensors().items()}
        return parts | {self.name: (self.encoding, self.shape)}


def write(
    path: Path,
    weights: Sequence[Weight],
    files: Mapping[str, bytes],
    *,
    model: str,
    form: Form,
    encoding: str,
    progress: Progress | None = None,
) -> None:
    """Write a serialized model: to a temporary name beside `path`, which it takes over only when it is whole.

    Raises DiskFull before the first byte when it cannot fit, WriteFailed when writing breaks off; neither leaves
    anything behind.
    """
    manifest = Manifest(model, form, encoding, {k: v for w in weights for k, v in w.described().items()})
    if any(weight.encoding == "fp8" for weight in weights):
        manifest = replace(manifest, version=FP8_VERSION)
    header = _Header(manifest, weights, files)
    if os.path.isdir(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise WriteFailed(path, "it is a folder or a device")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        free = shutil.disk_usage(path.parent).free
        if header.file_bytes > free:
            raise DiskFull(path.name, path.parent, header.file_bytes, free)
        with _held(path) as file:
            hashes = _write_data(file, header, weights, files, progress)
            _write_header(file, header, hashes)
    except OSError as error:
        raise WriteFailed(path, error.strerror or str(error)) from error


@contextmanager
def _held(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, locked from beginning to end: then it becomes `path`; after an error it is gone."""
    partial, file = _new_partial(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # which renames no file that is open
                file.close()
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def _new_partial(path: Path) -> tuple[Path, BinaryIO]:
    """A locked file of a name that nobody else has; another if a process took it for abandoned before it was locked."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
        file = partial.open("xb")
        with suppress(OSError):  # not every file system has locks
            _lock(file, wait=True)
        if partial.exists():
            return partial, file
        file.close()


def _remove_abandoned(path: Path) -> None:
    """Remove what a process that was killed left of the same file: nobody holds its lock any more."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(OSError), left.open("rb+") as file:
            _lock(file)
            left.unlink()


def _lock(file: BinaryIO, wait: bool = False) -> None:
    """Take the file for this process while it is open. Raises OSError when another has it, unless it `wait`s."""
    with suppress(ImportError):  # Windows removes no file that is open
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


class _Header:
    """Where every tensor will lie: in the order given, but for those whose length would put the next at no multiple of
    its dtype's width, which come last."""

    def __init__(self, manifest: Manifest, weights: Sequence[Weight], files: Mapping[str, bytes]) -> None:
        self.manifest = manifest
        self.entries: dict[str, dict[str, Any]] = {}
        self.position = 0
        tensors = {name: kind for weight in weights for name, kind in weight.tensors().items()}
        lengths = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
        for name in sorted(tensors, key=lambda name: -math.gcd(lengths[name], MAX_WIDTH)):
            dtype, shape = tensors[name]
            self._place(name, WORDS[str(dtype).removeprefix("torch.")], shape, lengths[name])
        for name, data in files.items():
            self._place(FILE_PREFIX + name, "U8", (len(data),), len(data))
        self._place(SEAL, "U8", (SHA256_BYTES,), SHA256_BYTES)
        self.length = len(self.text({name: "0" * 2 * SHA256_BYTES for name in self.entries if name != SEAL}))

    def _place(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        offsets = [self.position, self.position + nbytes]
        self.entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        self.position += nbytes

    @property
    def file_bytes(self) -> int:
        return LENGTH_BYTES + self.length + self.position

    def place(self, name: str) -> tuple[int, int]:
        """Where a tensor's bytes begin in the file, and how many they are."""
        begin, end = self.entries[name]["data_offsets"]
        return LENGTH_BYTES + self.length + begin, end - begin

    def text(self, hashes: Mapping[str, str]) -> bytes:
        """The header's JSON, padded so that the data begins at a multiple of ALIGNMENT; its length never changes."""
        in_order = {name: hashes[name] for name in self.entries if name != SEAL}
        metadata = {"format": "pt", KEY: json.dumps(asdict(self.manifest) | {"sha256": in_order})}
        raw = json.dumps({"__metadata__": metadata, **self.entries}).encode()
        return raw + b" " * (-(LENGTH_BYTES + len(raw)) % ALIGNMENT)


def _write_data(
    file: BinaryIO, header: _Header, weights: Sequence[Weight], files: Mapping[str, bytes], progress: Progress | None
) -> dict[str, str]:
    """Write each tensor in its place -> their SHA-256 in hex."""
    hashes: dict[str, str] = {}
    done = 0
    for name, view in _contents(weights, files):
        begin, nbytes = header.place(name)
        assert len(view) == nbytes, (name, len(view), nbytes)
        hashes[name] = hashlib.sha256(view).hexdigest()
        file.seek(begin)
        file.write(view)
        done += nbytes
        if progress is not None:
            progress("Saving", done, header.position)
    return hashes


def _contents(weights: Sequence[Weight], files: Mapping[str, bytes]) -> Iterator[tuple[str, memoryview]]:
    from torch import Tensor

    for weight in weights:
        made = weight.make()  # alive until the caller asks for the next one
        parts = [made] if isinstance(made, Tensor) else made.tensors().values()
        tensors = [part.contiguous() for part in parts]
        yield from zip(weight.tensors(), map(_bytes_of, tensors), strict=True)
    for name, data in files.items():
        yield FILE_PREFIX + name, memoryview(data)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without numpy."""
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def _write_header(file: BinaryIO, header: _Header, hashes: Mapping[str, str]) -> None:
    """Write it before the data, and its own hash, the seal, behind."""
    text = header.text(hashes)
    assert len(text) == header.length, (len(text), header.length)
    file.seek(header.place(SEAL)[0])
    file.write(hashlib.sha256(text).digest())
    file.seek(0)
    file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
