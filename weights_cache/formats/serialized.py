"""Packed tensors, config, tokenizer and hashes in, one file out, and back. Knows no model and no codec.

A serialized model is a valid safetensors file: any safetensors tool opens it. Its metadata entry `pixtral` is the
`Manifest` as JSON; side files ("config.json", "tokenizer.json", …) are U8 tensors named `file/NAME`; a packed
tensor is U8 [rows, bytes of a row], or in the order of a kernel (`int4.Int4`, `nf4.NF4`), and the manifest says its
encoding and its true shape. The last tensor, `seal`, is the SHA-256 of the header, which holds the SHA-256 of every
other tensor: so nothing can change unseen.
"""

import ctypes
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from weights_cache import cache
from weights_cache.errors import CheckpointCorrupt, DiskFull, WeightsNotFound, WriteFailed, listed
from weights_cache.json_fields import parse_json_object
from weights_cache.manifest import Manifest, check_version, read_hashes
from weights_cache.progress import Progress

from .reader import TensorInfo
from .safetensors import LENGTH_BYTES, SafetensorsFile

if TYPE_CHECKING:
    import torch

KEY = "pixtral"
FILE_PREFIX = "file/"
SEAL = "seal"
HASH_HEX = 64  # characters of a SHA-256
ALIGNMENT = 64  # bytes; where the data begins
MAX_WIDTH = 4  # bytes of the widest dtype
DTYPE_WORDS = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.uint8": "U8"}


@dataclass(frozen=True)
class Weight:
    """One tensor to write: `make()` gives its bytes, when its turn comes, as a tensor of `dtype` and `stored_shape`."""

    name: str
    encoding: str
    shape: tuple[int, ...]
    dtype: str
    stored_shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], "torch.Tensor"]


def write(
    path: Path,
    weights: Sequence[Weight],
    files: Mapping[str, bytes],
    *,
    model: str,
    form: str,
    encoding: str,
    progress: Progress | None = None,
) -> None:
    """Write a serialized model: to a temporary name beside `path`, which it takes over only when it is whole.

    Raises DiskFull before the first byte when it cannot fit, WriteFailed when writing breaks off; neither leaves
    anything behind.
    """
    manifest = Manifest(model, form, encoding, {w.name: (w.encoding, w.shape) for w in weights})
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
        self.order = sorted(weights, key=lambda weight: -math.gcd(weight.nbytes, MAX_WIDTH))
        self.entries: dict[str, dict[str, Any]] = {}
        self.position = 0
        for weight in self.order:
            self._place(weight.name, weight.dtype, weight.stored_shape, weight.nbytes)
        for name, data in files.items():
            self._place(FILE_PREFIX + name, "U8", (len(data),), len(data))
        self._place(SEAL, "U8", (hashlib.sha256().digest_size,), hashlib.sha256().digest_size)
        self.length = len(self.text({name: "0" * HASH_HEX for name in self.entries if name != SEAL}))

    def _place(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        offsets = [self.position, self.position + nbytes]
        self.entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        self.position += nbytes

    @property
    def file_bytes(self) -> int:
        return LENGTH_BYTES + self.length + self.position

    def text(self, hashes: Mapping[str, str]) -> bytes:
        """The header's JSON, padded so that the data begins at a multiple of ALIGNMENT; its length never changes."""
        metadata = {"format": "pt", KEY: json.dumps(asdict(self.manifest) | {"sha256": hashes})}
        raw = json.dumps({"__metadata__": metadata, **self.entries}).encode()
        return raw + b" " * (-(LENGTH_BYTES + len(raw)) % ALIGNMENT)


def _write_data(
    file: Any, header: _Header, weights: Sequence[Weight], files: Mapping[str, bytes], progress: Progress | None
) -> dict[str, str]:
    """Stream the tensors behind the space for the header -> their SHA-256 in hex."""
    file.seek(LENGTH_BYTES + header.length)
    hashes: dict[str, str] = {}
    done = 0
    for name, view in _pieces(header.order, files):
        assert len(view) == _span(header.entries[name]), (name, len(view), header.entries[name])
        hashes[name] = hashlib.sha256(view).hexdigest()
        file.write(view)
        done += len(view)
        if progress is not None:
            progress("Saving", done, header.position)
    return hashes


def _pieces(weights: Iterable[Weight], files: Mapping[str, bytes]) -> Iterator[tuple[str, memoryview]]:
    for weight in weights:
        tensor = weight.make().contiguous()  # alive until the caller asks for the next one
        yield weight.name, _bytes_of(tensor)
    for name, data in files.items():
        yield FILE_PREFIX + name, memoryview(data)


def _write_header(file: Any, header: _Header, hashes: Mapping[str, str]) -> None:
    text = header.text(hashes)
    assert len(text) == header.length, (len(text), header.length)
    file.write(hashlib.sha256(text).digest())
    file.seek(0)
    file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    """The memory of a contiguous CPU tensor, without numpy."""
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def _span(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return end - begin


class SerializedFile:
    """An opened serialized model: header and seal checked, the rest as it is touched. A `Reader` of weights.

    Raises WeightsNotFound (no such file), CheckpointCorrupt (cut short, altered header) and SerializedTooNew.
    """

    def __init__(self, path: Path) -> None:
        if not os.path.isfile(path):
            raise WeightsNotFound(f"{path} is no file, so it", "model", "Check the path.")
        self.path = path
        self._file = SafetensorsFile(path)
        self._header = self._file.header_bytes
        self.manifest, self._hashes = self._read_manifest()

    def _read_manifest(self) -> tuple[Manifest, dict[str, str]]:
        metadata = self._file.metadata.get(KEY)
        if metadata is None:
            advice = "Give a file that `pixtral export` wrote; other forms are opened by --model-path."
            raise WeightsNotFound(self.path, "manifest, so it is no serialized model", advice)
        raw = parse_json_object(self.path, metadata.encode(errors="surrogatepass"), "its manifest")
        check_version(self.path, raw.get("version"))
        stored = self._file.tensors
        if SEAL not in stored or bytes(_bytes_of(self._file.tensor(SEAL))) != self.seal:
            raise CheckpointCorrupt(self.path, "its header was altered")
        hashes = read_hashes(self.path, raw, stored.keys() - {SEAL})
        return Manifest.read(self.path, raw, stored), hashes

    @property
    def seal(self) -> bytes:
        """SHA-256 of the header: it names the whole content."""
        return hashlib.sha256(self._header).digest()

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Our names -> TensorInfo with true shapes and encodings."""
        stored = self._file.tensors
        return {
            name: TensorInfo(name, stored[name].dtype, shape, stored[name].nbytes, self.path, encoding)
            for name, (encoding, shape) in self.manifest.tensors.items()
        }

    def tensor(self, name: str) -> "torch.Tensor":
        """As stored: floats in their shape, packed ones uint8 [rows, bytes of a row] or in the order of a kernel;
        memory-mapped."""
        return self._file.tensor(name)

    packed = tensor

    def release(self, name: str) -> None:
        """Give back the memory that reading the tensor has taken."""
        self._file.release(name)

    def read(self, name: str) -> bytes | None:
        """The side file `name`, or None."""
        stored = FILE_PREFIX + name
        return bytes(_bytes_of(self._file.tensor(stored))) if stored in self._file.tensors else None

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
        return hashlib.sha256(_bytes_of(self._file.tensor(name))).hexdigest()


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


def check(file: SerializedFile, *, weights: bool = True, progress: Progress | None = None) -> None:
    """Check every hash, and remember that the file is whole; without `weights` those of side files, for this once.

    Raises CheckpointCorrupt naming what was altered.
    """
    if altered := [f"{name[:200]!r}" for name in file.altered(weights=weights, progress=progress)]:
        raise CheckpointCorrupt(file.path, f"{listed(altered)} {'was' if len(altered) == 1 else 'were'} altered")
    if weights:
        cache.write_stamp(file.path, file.seal)


def verify_path(path: Path) -> SerializedFile:
    """Open a serialized model and check every hash, whatever is remembered of it."""
    file = SerializedFile(path)
    check(file)
    return file
