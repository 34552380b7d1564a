"""Where downloaded models live on disk, in the layout that the Hub's own library uses. Knows no network.

    <cache>/models--owner--name/refs/main                    a commit
    <cache>/models--owner--name/snapshots/<commit>/<file>    links to blobs
    <cache>/models--owner--name/trees/<commit>.json          what the repository holds (huggingface_hub >= 2)

Reading this needs no import of huggingface_hub (0.1 s), so a cached model starts at once and offline.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from . import layout, own_cache
from .errors import CheckpointCorrupt, WeightsError
from .formats.safetensors import SafetensorsFile
from .json_fields import read_json_object
from .layout import Form
from .own_cache import Listing
from .replacing import replacing
from .selection import CONFIGS, SIDE_FILES, Selection, select

SNAPSHOTS = "snapshots"
COMMIT = re.compile(r"[0-9a-f]{40}")


def cache_folder() -> Path:
    """The Hub's cache: HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else in ~/.cache."""
    default_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or default_home)
    folder = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    return Path(os.path.expandvars(folder)).expanduser()


def repo_folder(repo: str) -> Path:
    """Where the cache keeps the repository `owner/name`."""
    return cache_folder() / ("models--" + repo.replace("/", "--"))


def snapshot(repo: str, commit: str) -> Path:
    return repo_folder(repo) / SNAPSHOTS / commit


def blob(repo: str, etag: str) -> Path:
    """Where the cache keeps the content whose hash is `etag`."""
    return repo_folder(repo) / "blobs" / etag


def partial_blob(repo: str, etag: str) -> Path:
    """Where the part of it lies that has arrived; the Hub's own library neither reads nor removes it."""
    return blob(repo, f"{etag}.pixtral.incomplete")


def snapshot_of(path: Path) -> Path | None:
    """The snapshot in which the file `path` lies, in the Hub's cache or in our own."""
    return next((folder for folder in path.absolute().parents if folder.parent.name == SNAPSHOTS), None)


def find(
    repo: str, revision: str, *, weights: bool, form: Form | None = None, file: str | None = None, headers: bool = False
) -> Path | None:
    """What to open of `repo` at `revision` (a branch, tag or commit) if it is here and complete, else None.

    `form` and `file` choose as in `select`; of a GGUF, `headers` that were fetched without the rest will do. Where
    nobody remembers what the repository holds, a GGUF must be named.
    """
    commit = _commit(repo, revision)
    if not commit:
        return None
    folder = snapshot(repo, commit)
    listing = own_cache.listing(repo, commit)
    names = _names_in(folder) if listing is None else listing
    try:
        selection = select(repo, names, form=form, file=file, weights=weights)
    except WeightsError:
        return None
    if listing is None and selection.form == "gguf" and file is None and form is None:
        return None
    if headers and not is_complete(folder, selection, listing or {}, weights=weights):
        folder = own_cache.headers_folder(repo, commit)
    if _lacks_listed(repo, commit, selection) or not is_complete(folder, selection, listing or {}, weights=weights):
        return None
    own_cache.mark_used(repo, commit)
    return selection.path(folder)


def is_complete(folder: Path, selection: Selection, sizes: Listing, *, weights: bool) -> bool:
    """Whether `folder` holds all that is selected and, if `weights` are wanted, every weights file in full.

    The downloader here writes the config after all other small files: where it is, they are.
    """
    if selection.form == "gguf":
        return all(_is_here(folder / name, sizes.get(name)) for name in selection.weights)
    if not any((folder / name).is_file() for name in layout.TOKENIZERS):
        return False
    if not all(_is_here(folder / name, sizes.get(name)) for name in selection.side):
        return False
    try:
        return not weights or all(is_whole(path) for path in layout.weight_files(folder, selection.form))
    except WeightsError:
        return False


def _is_here(path: Path, size: int | None) -> bool:
    return path.is_file() and (size is None or path.stat().st_size == size)


def is_whole(path: Path) -> bool:
    """Whether the file is there and, for safetensors, exactly as long as its header says."""
    if not path.is_file():
        return False
    if path.suffix != layout.SAFETENSORS:
        return True
    try:
        SafetensorsFile(path)
    except CheckpointCorrupt:
        return False
    return True


def write_ref(repo: str, revision: str, commit: str) -> None:
    """Records that `revision` of `repo` is `commit`; a reader sees the old line or the new one, never half."""
    if revision == commit:
        return
    with replacing(repo_folder(repo) / "refs" / revision) as temporary:
        temporary.write_text(commit)


def link(source: Path, target: Path) -> None:
    """Make `target` lead to `source`; a copy where there are no links. It is there whole, or as it was."""
    with replacing(target) as temporary:
        try:
            temporary.symlink_to(os.path.relpath(source, target.parent))
        except OSError:
            shutil.copyfile(source, temporary)


def _names_in(folder: Path) -> list[str]:
    return sorted(_walk(folder)) if folder.is_dir() else []


def _walk(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _commit(repo: str, revision: str) -> str | None:
    if COMMIT.fullmatch(revision):
        return revision
    try:
        commit = (repo_folder(repo) / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def _lacks_listed(repo: str, commit: str, selection: Selection) -> bool:
    """Whether the library's listing of the repository, where it left one, names a side file that is not here."""
    listing = repo_folder(repo) / "trees" / f"{commit}.json"
    if not listing.is_file() or selection.form == "gguf":
        return False
    try:
        files = read_json_object(listing).get("files", {})
    except CheckpointCorrupt:
        return False
    side = [name for name in (*SIDE_FILES, CONFIGS[selection.form]) if name in files]
    return any(not (snapshot(repo, commit) / name).is_file() for name in side)
