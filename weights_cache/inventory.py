"""The Hub's cache and our own in, the models that lie there out; and how one of them is checked or removed.

Knows no terminal. Only folders are trusted to say what is ours to remove: links are taken away, never followed.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from . import cache, layout, weight_files
from .cache import CachedRepo
from .errors import Unreadable, WeightsError
from .formats import serialized
from .formats.gguf import GgufFile
from .formats.reader import Reader
from .formats.safetensors import SafetensorsFile
from .json_fields import read_json_object
from .layout import FOLDER_FORMS, SIDE_FILES, Form, select
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
    `encoding` is that of most of its weights, or None. `nbytes` is what the disk holds, `used` seconds since 1970,
    `known` whether it is this program's to prune: in our own folder, or in the Hub's cache, which serves other programs
    as well, and asked for by this one. A serialized model elsewhere is the user's, and its name is its path.
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
    return sorted([*_from_hub(), *_own()], key=lambda model: (model.name, model.format))


def hub_names() -> list[str]:
    """The names of the models in the Hub's cache, as `models` has them, without a look into their weights."""
    names: set[str] = set()
    for root in _repo_folders():
        with suppress(PermissionError, Unreadable):
            names |= set(_names_in(root))
    return sorted(names)


def _names_in(root: Path) -> Iterator[str]:
    """The names that the models of `_in_repo` have."""
    repo = _repo(root)
    found = [(snapshot, form, file) for snapshot in _snapshots(root) for form, file in _forms_in(snapshot)]
    yield from (_name(repo, snapshot, file) for snapshot, _, file in found)
    if _parts(root):
        if all(_is_whole(*each) for each in found):  # else they are its missing shards
            yield repo
    elif not found and CachedRepo(repo).notes.is_dir():
        yield repo


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
    if model.format == SERIALIZED:
        try:
            return [f"{model.path.name}: {name}" for name in serialized.SerializedFile(model.path).altered()]
        except WeightsError:
            return [model.path.name]
    found, done = [], 0
    for path in model.files:
        if not _is_genuine(path):
            found.append(path.name)
        done += _size(path)
        if progress is not None:
            progress(f"checking {model.name}", done, model.nbytes)
    return found


def remove(model: Model) -> None:
    """Take the model away; what it shares with another stays. Raises OSError.

    Killed half-way, the rest is an incomplete model, which nobody takes for a whole one.
    """
    if model.repo is None:
        model.path.unlink()
        return
    root = CachedRepo(model.repo).folder
    shared, parts = _shared(model), [] if model.format == INCOMPLETE else _parts(root)
    linked = _linked(root) | {path.resolve() for path in model.files}
    for path in model.files:
        if path not in shared:
            path.unlink(missing_ok=True)
    for snapshot in _snapshots(root):
        if snapshot.name == (model.commit or snapshot.name) and not _forms_in(snapshot):
            shutil.rmtree(snapshot)
            _forget(model.repo, snapshot.name, root)
    _remove_unused_blobs(root, linked, keep=parts)
    if not _snapshots(root) and not any((root / "blobs").glob("*")):
        shutil.rmtree(root)
        shutil.rmtree(CachedRepo(model.repo).notes, ignore_errors=True)


def _shared(model: Model) -> set[Path]:
    """Files that another model in the same snapshot needs as well: a tokenizer, a picture part."""
    if model.repo is None or model.commit is None:
        return set()
    others = _in_snapshot(model.repo, CachedRepo(model.repo).snapshot(model.commit))
    return {path for each in others if (each.path, each.format) != (model.path, model.format) for path in each.files}


def _from_hub() -> Iterator[Model]:
    for root in _repo_folders():
        with suppress(PermissionError, Unreadable):
            yield from _in_repo(root)


def _repo_folders() -> list[Path]:
    """What is elsewhere is not the cache's."""
    found = sorted(cache.hub_cache_folder().glob("models--*--*"))
    return [root for root in found if root.is_dir() and not root.is_symlink()]


def _repo(root: Path) -> str:
    return root.name.removeprefix("models--").replace("--", "/", 1)


def _in_repo(root: Path) -> list[Model]:
    repo = _repo(root)
    found = [model for snapshot in _snapshots(root) for model in _in_snapshot(repo, snapshot)]
    parts = _parts(root)
    broken = next((model for model in found if model.format == INCOMPLETE), None)
    if broken:
        found[found.index(broken)] = replace(
            broken, files=(*broken.files, *parts), nbytes=broken.nbytes + sum(map(_size, parts))
        )
    elif rest := _rest(repo, root, parts, any_model=bool(found)):
        found.append(rest)
    return found


def _snapshots(root: Path) -> list[Path]:
    return sorted(each for each in (root / "snapshots").glob("*") if each.is_dir() and not each.is_symlink())


def _parts(root: Path) -> list[Path]:
    """What has arrived of contents: ours, which a download goes on with, and may come beside a whole one that is
    fetched anew; of the Hub's library those that are not whole, since what it left of others is only debris."""
    blobs = root / "blobs"
    parts = [path for path in blobs.glob("*.incomplete") if path.is_file()]
    return [path for path in parts if _is_ours(path) or not (blobs / path.name.partition(".")[0]).is_file()]


def _is_ours(part: Path) -> bool:
    return part.name.endswith(".pixtral.incomplete")


def _rest(repo: str, root: Path, parts: list[Path], any_model: bool) -> Model | None:
    """What a download left before any of its weights was whole; and where there is no model, the small files and
    headers of one whose weights this program never wanted."""
    ours = all(map(_is_ours, parts))
    noted = CachedRepo(repo).notes
    if not parts and not any_model and noted.is_dir():
        parts = [path for folder in (root / "snapshots", noted) for path in folder.rglob("*") if path.is_file()]
    if not parts:
        return None
    nbytes = sum(min(path.stat().st_size, path.stat().st_blocks * BLOCK) for path in parts)
    used = max(path.stat().st_mtime for path in parts)
    return Model(repo, INCOMPLETE, root, tuple(parts), None, nbytes, used, ours, repo)


def _suffix(root: Path, commit: str) -> str:
    """What follows the repository's name: nothing for main, and nothing before a first download has ended; else a
    branch, a tag or the commit after an @."""
    refs = root / "refs"
    files = sorted(path for path in refs.rglob("*") if path.is_file())
    names = [path.relative_to(refs).as_posix() for path in files if _text(path) == commit]
    return "" if "main" in names or not files else f"@{names[0] if names else commit}"


def _name(repo: str, snapshot: Path, file: str | None) -> str:
    name = repo + _suffix(CachedRepo(repo).folder, snapshot.name)
    return f"{name}:{file}" if file else name


def _text(path: Path) -> str:
    return path.read_text(errors="replace").strip()


def _in_snapshot(repo: str, snapshot: Path) -> Iterator[Model]:
    asked = CachedRepo(repo).last_used(snapshot.name)
    for form, file in _forms_in(snapshot):
        weights = _weights(snapshot, form, file)
        files = weights if file else _side(snapshot, form) + weights
        used = max([asked or 0.0, *(path.stat().st_atime for path in weights)])
        yield Model(
            _name(repo, snapshot, file),
            form if _is_whole(snapshot, form, file) else INCOMPLETE,
            snapshot / file if file else snapshot,
            tuple(files),
            main_encoding(snapshot / file if file else weights[0], snapshot) if weights else None,
            sum(map(_size, files)),
            used,
            asked is not None,
            repo,
            snapshot.name,
        )


def _is_whole(snapshot: Path, form: Form, file: str | None) -> bool:
    """Whether no shard is missing."""
    if file:
        return all((snapshot / name).is_file() for name in layout.shard_names(file))
    try:
        return bool(weight_files.in_folder(snapshot, form))
    except WeightsError:
        return False


def _forms_in(snapshot: Path) -> list[tuple[Form, str | None]]:
    """The models in a snapshot: (form, the GGUF's name)."""
    names = weight_files.file_names(snapshot, deep=True)
    found: list[tuple[Form, str | None]] = [(form, None) for form in layout.forms(names) if form != "gguf"]
    return found + [("gguf", name) for name in layout.weight_names(names, "gguf")]


def _weights(snapshot: Path, form: Form, file: str | None) -> list[Path]:
    chosen = select("", weight_files.file_names(snapshot, deep=True), form=form, file=file)
    names = set(chosen.weights)
    if chosen.index:
        with suppress(WeightsError):
            names |= set(weight_files.shards(snapshot / chosen.index))
    return sorted((snapshot / name for name in names if (snapshot / name).is_file()), key=lambda path: -_size(path))


def _side(snapshot: Path, form: Form) -> list[Path]:
    names = [*SIDE_FILES, FOLDER_FORMS[form].config]
    return [snapshot / name for name in names if (snapshot / name).is_file()]


def _own() -> Iterator[Model]:
    folder = cache.models_folder()
    for path, name in serialized_files().items():
        yield _serialized(name, path, known=path.is_relative_to(folder))


def _serialized(name: str, path: Path, *, known: bool) -> Model:
    encoding = None
    with suppress(WeightsError):
        encoding = serialized.SerializedFile(path).manifest.encoding
    found = path.stat()
    used = cache.stamped_at(path) or found.st_mtime
    return Model(name, SERIALIZED, path, (path,), encoding, found.st_size, used, known)


def _is_genuine(path: Path) -> bool:
    """A content's name in the Hub's cache is its hash; a file without such a name can only be whole by its header."""
    digest = path.resolve().name
    if path.is_symlink() and len(digest) == SHA256_HEX:
        return cache.has_hash(path, sha256=digest)
    if path.is_symlink() and len(digest) == SHA1_HEX:
        return cache.has_hash(path, sha1=digest)
    return cache.is_whole(path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _forget(repo: str, commit: str, root: Path) -> None:
    """No revision points to the commit any more, and nothing is remembered of it."""
    for ref in [path for path in (root / "refs").rglob("*") if path.is_file()]:
        if _text(ref) == commit:
            ref.unlink()
    (root / "trees" / f"{commit}.json").unlink(missing_ok=True)
    shutil.rmtree(CachedRepo(repo).headers(commit), ignore_errors=True)
    for suffix in (".json", ".used"):
        (CachedRepo(repo).notes / f"{commit}{suffix}").unlink(missing_ok=True)
    with suppress(OSError):
        CachedRepo(repo).headers(commit).parent.rmdir()
    with suppress(OSError):
        CachedRepo(repo).notes.rmdir()


def _linked(root: Path) -> set[Path]:
    """The contents to which snapshots lead."""
    return {path.resolve() for path in (root / "snapshots").rglob("*") if path.is_symlink()}


def _remove_unused_blobs(root: Path, linked: set[Path], keep: list[Path]) -> None:
    """Contents to which no snapshot leads, apart from those to `keep`; one that was not `linked` before is left while
    it is young: another process may have fetched it, and be about to link it."""
    used = _linked(root) | {path.resolve() for path in keep}
    blobs = root / "blobs"
    if blobs.is_symlink():
        return
    for blob in blobs.glob("*"):
        if blob.resolve() in used or blob.is_dir():
            continue
        with suppress(FileNotFoundError):
            if blob.resolve() in linked or time.time() - blob.lstat().st_mtime > YOUNG:
                blob.unlink()


def main_encoding(path: Path, folder: Path) -> str | None:
    """The encoding that takes most bytes of the weights file `path`, or None; the config is in `folder`.

    The time at which the file was last used is not changed by reading its header.
    """
    if path.suffix not in (layout.SAFETENSORS, layout.GGUF) or not path.is_file():
        return None
    before = path.stat()
    try:
        reader: Reader = GgufFile(path) if path.suffix == layout.GGUF else SafetensorsFile(path)
        return _most_common(reader, folder)
    except WeightsError:
        return None
    finally:
        with suppress(OSError):
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _most_common(reader: Reader, folder: Path) -> str | None:
    if (folder / layout.CONFIG).is_file():
        method = read_json_object(folder / layout.CONFIG).get("quantization_config")
        if isinstance(method, dict) and method.get("load_in_4bit"):
            return str(method.get("bnb_4bit_quant_type", "nf4"))
    sizes: dict[str, int] = {}
    for tensor in reader.tensors.values():
        sizes[tensor.encoding] = sizes.get(tensor.encoding, 0) + tensor.nbytes
    return max(sizes, key=lambda name: sizes[name], default=None)
