"""The models in the Hub's cache and in ours: listed, compared with their hashes, removed. Knows no terminal.

Only folders are trusted to say what is ours to remove: links are removed, never followed.
"""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from . import cache, layout, weight_files
from .cache import CachedRepo
from .errors import Unreadable, WeightsError
from .formats import serialized
from .formats.gguf import GgufFile
from .formats.reader import Reader
from .formats.safetensors import E4M3, SafetensorsFile
from .json_fields import read_json_object
from .layout import Form, Selection
from .progress import Progress

INCOMPLETE = "incomplete"
SERIALIZED = "serialized"
SHA256_HEX, SHA1_HEX = 64, 40
YOUNG = 600  # seconds in which a download links what has arrived
BLOCK = 512  # bytes that a file system counts as one: of a file with nothing but its header, fewer than it is long


@dataclass(frozen=True)
class Model:
    """A model in a cache. `path` is what to open; `files` are what it consists of, as they are named there.

    `format` is "hf", "native", "gguf", "serialized", or "incomplete" for what has not all of its weights.
    `encoding` is that of most of its weights, or None. `nbytes` is what the disk holds, `used` in seconds since 1970.
    `known` says whether this program may prune it: if it lies in our own folder, or if this program has asked for it in
    the Hub's cache, which serves others as well. A serialized model elsewhere is the user's; its name is its path.
    """

    name: str
    format: str
    path: Path
    files: tuple[Path, ...]
    encoding: str | None
    nbytes: int
    used: float
    known: bool
    repo: str | None = None
    commit: str | None = None


def models() -> list[Model]:
    """All models in both caches, by name."""
    found: list[Model] = []
    for repo in _repos():
        with suppress(PermissionError, Unreadable):
            found += _models_of(repo)
    folder = cache.models_folder()
    for path, name in serialized_files().items():
        with suppress(FileNotFoundError):  # removed since it was listed
            found.append(_serialized(name, path, known=path.is_relative_to(folder)))
    return sorted(found, key=lambda model: (model.name, model.format))


def hub_names() -> list[str]:
    """The names of the models in the Hub's cache, as `models` gives them, without reading their weights."""
    names: set[str] = set()
    for repo in _repos():
        with suppress(PermissionError, Unreadable):
            found = _snapshot_models(repo)
            names |= {each.name for each in found}
            if _partials(repo):
                if all(each.is_whole() for each in found):  # else they are its missing shards
                    names.add(repo.name)
            elif not found and repo.notes.is_dir():
                names.add(repo.name)
    return sorted(names)


def serialized_files() -> dict[Path, str]:
    """Serialized models: those in our own folder, named by their place in it, and those that were written elsewhere."""
    folder = cache.models_folder()
    inside: list[Path] = []
    with suppress(PermissionError):
        inside = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    found = {path: path.relative_to(folder).as_posix() for path in inside if not path.name.startswith(".")}
    here = {path.resolve() for path in inside}
    return found | {path: str(path) for path in cache.stamped_files() if path not in here}


def altered(model: Model, progress: Progress | None = None) -> list[str]:
    """The names of the model's files that are not what they were when they were fetched or written; reads them all."""
    found, done = [], 0

    def report(read: int, total: int = model.nbytes) -> None:
        """`read` bytes of the file after the `done` of those before it."""
        if progress is not None:
            progress(f"checking {model.name}", done + read, total)

    if model.format == SERIALIZED:
        try:
            names = serialized.SerializedFile(model.path).altered(
                progress=lambda _, read, total: report(read, total or read)
            )
        except WeightsError:
            return [model.path.name]
        return [f"{model.path.name}: {name}" for name in names]
    for path in model.files:
        if not _is_genuine(path, report):
            found.append(path.name)
        done += _size(path)
        report(0)
    return found


def remove(model: Model) -> None:
    """Remove the model; what it shares with another stays. Raises OSError.

    If the process is killed half-way, the rest is listed as an incomplete model.
    """
    if model.repo is None:
        model.path.unlink()
        return
    repo = CachedRepo(model.repo)
    shared, parts = _shared(model, repo), [] if model.format == INCOMPLETE else _partials(repo)
    linked = _linked(repo) | {path.resolve() for path in model.files}
    for path in model.files:
        if path not in shared:
            path.unlink(missing_ok=True)
    for commit in _commits(repo):
        if commit == (model.commit or commit) and not _models_at(repo, commit):
            shutil.rmtree(repo.snapshot(commit))
            _forget(repo, commit)
    _remove_unused_blobs(repo, linked, keep=parts)
    if not _commits(repo) and not any((repo.folder / "blobs").glob("*")):
        shutil.rmtree(repo.folder)
        shutil.rmtree(repo.notes, ignore_errors=True)


def main_encoding(path: Path, folder: Path) -> str | None:
    """The encoding that takes most bytes of the weights file `path`, or None; the config is in `folder`.

    The time at which the file was last used is not changed by reading its header.
    """
    if path.suffix not in (layout.SAFETENSORS, layout.GGUF) or not path.is_file():
        return None
    before = path.stat()
    try:
        if (folder / layout.CONFIG).is_file():
            method = read_json_object(folder / layout.CONFIG).get("quantization_config")
            if isinstance(method, dict) and method.get("load_in_4bit"):
                return str(method.get("bnb_4bit_quant_type", "nf4"))
        reader: Reader = GgufFile(path) if path.suffix == layout.GGUF else SafetensorsFile(path)
        sizes: dict[str, int] = {}
        for tensor in reader.tensors.values():
            encoding = "fp8" if tensor.dtype == E4M3 else tensor.encoding
            sizes[encoding] = sizes.get(encoding, 0) + tensor.nbytes
        return max(sizes, key=lambda name: sizes[name], default=None)
    except WeightsError:
        return None
    finally:
        with suppress(OSError):
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@dataclass(frozen=True)
class _SnapshotModel:
    """A model in a snapshot, whole or not: the folder in `form`, or the GGUF `file` in it."""

    repo: CachedRepo
    commit: str
    form: Form
    file: str | None = None

    @property
    def folder(self) -> Path:
        return self.repo.snapshot(self.commit)

    @property
    def name(self) -> str:
        """The repository; of main nothing more, nor before a first download has ended; else @ and a branch, a tag or
        the commit."""
        refs = _refs(self.repo)
        names = [revision for revision, commit in refs.items() if commit == self.commit]
        at = "" if "main" in names or not refs else f"@{names[0] if names else self.commit}"
        return self.repo.name + at + (f":{self.file}" if self.file else "")

    def is_whole(self) -> bool:
        """Whether no shard is missing."""
        if self.file:
            return all((self.folder / name).is_file() for name in layout.shard_names(self.file))
        try:
            return bool(weight_files.in_folder(self.folder, self.form))
        except WeightsError:
            return False

    @cached_property
    def selection(self) -> Selection:
        names = weight_files.file_names(self.folder, deep=True)
        return layout.select("", names, form=self.form, file=self.file)

    def weights(self) -> list[Path]:
        """The weights files that are here, an index among them, the largest first."""
        names = set(self.selection.weights)
        with suppress(WeightsError):
            names |= set(weight_files.selected(self.selection, self.folder))
        here = (self.folder / name for name in names if (self.folder / name).is_file())
        return sorted(here, key=lambda path: -_size(path))

    def model(self) -> Model:
        asked, weights = self.repo.last_used(self.commit), self.weights()
        files = [self.folder / name for name in self.selection.side] + weights
        used = max([asked or 0.0, *(file.stat().st_atime for file in weights)])  # before any is looked into
        path = self.folder / self.file if self.file else self.folder
        return Model(
            name=self.name,
            format=self.form if self.is_whole() else INCOMPLETE,
            path=path,
            files=tuple(files),
            encoding=main_encoding(path if self.file else weights[0], self.folder) if weights else None,
            nbytes=sum(map(_size, files)),
            used=used,
            known=asked is not None,
            repo=self.repo.name,
            commit=self.commit,
        )


def _repos() -> list[CachedRepo]:
    """The repositories in the Hub's cache; links to folders elsewhere are left out."""
    found = sorted(cache.hub_cache_folder().glob("models--*--*"))
    roots = [root for root in found if root.is_dir() and not root.is_symlink()]
    return [CachedRepo(root.name.removeprefix("models--").replace("--", "/", 1)) for root in roots]


def _commits(repo: CachedRepo) -> list[str]:
    """The commits of which there is a snapshot."""
    folders = (repo.folder / cache.SNAPSHOTS).glob("*")
    return sorted(each.name for each in folders if each.is_dir() and not each.is_symlink())


def _refs(repo: CachedRepo) -> dict[str, str]:
    """Branches and tags -> the commits that they were."""
    refs = repo.folder / "refs"
    files = sorted(path for path in refs.rglob("*") if path.is_file())
    return {path.relative_to(refs).as_posix(): path.read_text(errors="replace").strip() for path in files}


def _snapshot_models(repo: CachedRepo) -> list[_SnapshotModel]:
    return [each for commit in _commits(repo) for each in _models_at(repo, commit)]


def _models_at(repo: CachedRepo, commit: str) -> list[_SnapshotModel]:
    names = weight_files.file_names(repo.snapshot(commit), deep=True)
    folders = [_SnapshotModel(repo, commit, form) for form in layout.forms(names) if form != "gguf"]
    return folders + [_SnapshotModel(repo, commit, "gguf", name) for name in layout.weight_names(names, "gguf")]


def _models_of(repo: CachedRepo) -> list[Model]:
    """The models of a repository; partial downloads belong to one that is incomplete, or stand for one."""
    found, partials = [each.model() for each in _snapshot_models(repo)], _partials(repo)
    for number, model in enumerate(found):
        if model.format == INCOMPLETE:
            nbytes = model.nbytes + sum(map(_size, partials))
            found[number] = replace(model, files=(*model.files, *partials), nbytes=nbytes)
            return found
    leftover = _leftover(repo, partials, any_model=bool(found))
    return [*found, leftover] if leftover else found


def _partials(repo: CachedRepo) -> list[Path]:
    """Partial downloads that can be gone on with: all of ours; of the Hub's library those whose content is not whole,
    since it only leaves debris beside the others."""
    blobs = repo.folder / "blobs"
    parts = [path for path in blobs.glob("*.incomplete") if path.is_file()]
    return [path for path in parts if _is_ours(path) or not (blobs / path.name.partition(".")[0]).is_file()]


def _is_ours(part: Path) -> bool:
    return part.name.endswith(cache.PARTIAL)


def _leftover(repo: CachedRepo, parts: list[Path], any_model: bool) -> Model | None:
    """The partial downloads as an incomplete model; where there are none, and no model either, the small files and
    headers of a model whose weights were never asked for."""
    ours = all(map(_is_ours, parts))
    if not parts and not any_model and repo.notes.is_dir():
        folders = (repo.folder / cache.SNAPSHOTS, repo.notes)
        parts = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    if not parts:
        return None
    nbytes = sum(min(path.stat().st_size, path.stat().st_blocks * BLOCK) for path in parts)
    used = max(path.stat().st_mtime for path in parts)
    return Model(repo.name, INCOMPLETE, repo.folder, tuple(parts), None, nbytes, used, ours, repo.name)


def _serialized(name: str, path: Path, *, known: bool) -> Model:
    encoding = None
    with suppress(WeightsError):
        encoding = serialized.SerializedFile(path).manifest.encoding
    found = path.stat()
    used = cache.stamped_at(path) or found.st_mtime
    return Model(name, SERIALIZED, path, (path,), encoding, found.st_size, used, known)


def _is_genuine(path: Path, report: Callable[[int], None]) -> bool:
    """A content's name in the Hub's cache is its hash; a file without such a name can only be whole by its header."""
    digest = path.resolve().name
    if path.is_symlink() and len(digest) == SHA256_HEX:
        return cache.has_hash(path, sha256=digest, report=lambda read, _: report(read))
    if path.is_symlink() and len(digest) == SHA1_HEX:
        return cache.has_hash(path, sha1=digest, report=lambda read, _: report(read))
    return cache.is_whole(path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _shared(model: Model, repo: CachedRepo) -> set[Path]:
    """Files that another model in the same snapshot needs as well: a tokenizer, an mmproj file."""
    others = [each.model() for each in _models_at(repo, model.commit)] if model.commit else []
    return {path for each in others if (each.path, each.format) != (model.path, model.format) for path in each.files}


def _forget(repo: CachedRepo, commit: str) -> None:
    """No revision points to the commit any more, and nothing is remembered of it."""
    for revision, at in _refs(repo).items():
        if at == commit:
            (repo.folder / "refs" / revision).unlink()
    (repo.folder / "trees" / f"{commit}.json").unlink(missing_ok=True)
    shutil.rmtree(repo.headers(commit), ignore_errors=True)
    for suffix in (".json", ".used"):
        (repo.notes / f"{commit}{suffix}").unlink(missing_ok=True)
    for folder in (repo.headers(commit).parent, repo.notes):
        with suppress(OSError):
            folder.rmdir()


def _linked(repo: CachedRepo) -> set[Path]:
    """The contents to which snapshots lead."""
    return {path.resolve() for path in (repo.folder / cache.SNAPSHOTS).rglob("*") if path.is_symlink()}


def _remove_unused_blobs(repo: CachedRepo, linked: set[Path], keep: list[Path]) -> None:
    """Remove contents to which no snapshot leads, apart from those to `keep`. One that was not `linked` before stays
    while it is young: another process may have fetched it and be about to link it."""
    used = _linked(repo) | {path.resolve() for path in keep}
    blobs = repo.folder / "blobs"
    if blobs.is_symlink():
        return
    for blob in blobs.glob("*"):
        if blob.resolve() in used or blob.is_dir():
            continue
        with suppress(FileNotFoundError):
            if blob.resolve() in linked or time.time() - blob.lstat().st_mtime > YOUNG:
                blob.unlink()
