"""Where models live on this disk: in the Hub's cache, and our own files beside it. Knows no network.

    <hub>/models--owner--name/refs/main                    a commit
    <hub>/models--owner--name/snapshots/<commit>/<file>    links to blobs
    <hub>/models--owner--name/blobs/<hash>                 the contents
    <hub>/models--owner--name/trees/<commit>.json          what the repository holds (huggingface_hub >= 2)

    <own>/hub/models--owner--name/<commit>.json    what the repository holds: {file name: bytes}
    <own>/hub/models--owner--name/<commit>.used    empty; its time is when the model was last asked for
    <own>/hub/models--owner--name/snapshots/<commit>/<file>.gguf    as long as the file, with its header only
    <own>/models/                                  models that were encoded once and saved here
    <own>/stamps/                                  of files whose hashes were checked: one line each

Reading this needs no import of huggingface_hub (0.1 s), so a cached model starts at once and offline. Listings say
what a snapshot lacks without a network call. All of our own can be deleted at any time. Whoever writes, writes under
another name first (`replacing`): correctness depends on no lock.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from . import layout, weight_files
from .errors import CheckpointCorrupt, WeightsError
from .formats.safetensors import SafetensorsFile
from .json_fields import read_json_object
from .layout import Form, Listing, Selection

SNAPSHOTS = "snapshots"
PARTIAL = ".pixtral.incomplete"
STAMPS = "stamps"
CHUNK = 2**22  # bytes read at once
STAMP_FIELDS = 4  # before the path
COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_cache_folder() -> Path:
    """The Hub's cache: HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else in ~/.cache."""
    default_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or default_home)
    folder = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    return Path(os.path.expandvars(folder)).expanduser()


def own_cache_folder() -> Path:
    """PIXTRAL_CACHE, else $XDG_CACHE_HOME/pixtral, else ~/.cache/pixtral. It need not exist."""
    chosen = os.environ.get("PIXTRAL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pixtral"
    return Path(os.path.expandvars(chosen)).expanduser()


def models_folder() -> Path:
    """Where encoded models are kept."""
    return own_cache_folder() / "models"


@dataclass(frozen=True)
class CachedRepo:
    """The repository `name`, which is `owner/name`: its folder in the Hub's cache, and what is noted of it in ours."""

    name: str

    @property
    def _folder_name(self) -> str:
        return "models--" + self.name.replace("/", "--")

    @property
    def folder(self) -> Path:
        return hub_cache_folder() / self._folder_name

    @property
    def notes(self) -> Path:
        """Our own folder of it."""
        return own_cache_folder() / "hub" / self._folder_name

    def snapshot(self, commit: str) -> Path:
        return self.folder / SNAPSHOTS / commit

    def headers(self, commit: str) -> Path:
        """Where the headers of its GGUF files lie that were fetched without the rest."""
        return self.notes / SNAPSHOTS / commit

    def blob(self, sha256: str) -> Path:
        """Where the content with that hash lies."""
        return self.folder / "blobs" / sha256

    def partial_blob(self, sha256: str) -> Path:
        """Where the part that has arrived lies; the Hub's own library neither reads nor removes it."""
        return self.blob(sha256 + PARTIAL)

    def lock(self, sha256: str) -> Path:
        """The lock on its download, beside those of the Hub's library."""
        return hub_cache_folder() / ".locks" / self._folder_name / f"{sha256}.pixtral.lock"

    def commit(self, revision: str) -> str | None:
        """The commit that `revision` (a branch, tag or commit) was when it was last fetched."""
        if COMMIT.fullmatch(revision):
            return revision
        try:
            commit = (self.folder / "refs" / revision).read_text().strip()
        except (OSError, ValueError):
            return None
        return commit if COMMIT.fullmatch(commit) else None

    def write_ref(self, revision: str, commit: str) -> None:
        """Record that `revision` is `commit`; a reader sees the old line or the new one, never half."""
        if revision != commit:
            with replacing(self.folder / "refs" / revision) as temporary:
                temporary.write_text(commit)

    def listing(self, commit: str) -> Listing | None:
        """What the repository holds, or None when it was not noted."""
        try:
            found = read_json_object(self.notes / f"{commit}.json")
        except CheckpointCorrupt:
            return None
        return {name: size if isinstance(size, int) else None for name, size in found.items()}

    def write_listing(self, commit: str, files: Listing) -> None:
        """Note what the repository holds; without it all works, with more questions to the Hub."""
        with suppress(OSError), replacing(self.notes / f"{commit}.json") as temporary:
            temporary.write_text(json.dumps(dict(files)))

    def mark_used(self, commit: str) -> None:
        """Note that the model was asked for now: file systems often do not (noatime)."""
        with suppress(OSError):
            self.notes.mkdir(parents=True, exist_ok=True)
            (self.notes / f"{commit}.used").touch()

    def last_used(self, commit: str) -> float | None:
        """When the model was last asked for, in seconds since 1970, or None."""
        try:
            return (self.notes / f"{commit}.used").stat().st_mtime
        except OSError:
            return None

    def lacks_listed(self, commit: str, selection: Selection) -> bool:
        """Whether the library's listing, where it left one, names a small file that is not here."""
        if selection.form == "gguf":
            return False
        try:
            files = read_json_object(self.folder / "trees" / f"{commit}.json").get("files", {})
        except CheckpointCorrupt:
            return False
        small = [name for name in (*layout.SIDE_FILES, layout.FOLDER_FORMS[selection.form].config) if name in files]
        return any(not (self.snapshot(commit) / name).is_file() for name in small)


def find(
    repo: str, revision: str, *, weights: bool, form: Form | None = None, file: str | None = None, headers: bool = False
) -> Path | None:
    """What to open of `repo` at `revision` (a branch, tag or commit) if it is here and complete, else None.

    `form` and `file` choose as in `layout.select`; of a GGUF, `headers` that were fetched without the rest will do.
    Where nobody noted what the repository holds, a GGUF must be named.
    """
    cached = CachedRepo(repo)
    commit = cached.commit(revision)
    if not commit:
        return None
    folder, listing = cached.snapshot(commit), cached.listing(commit)
    try:
        names = weight_files.file_names(folder, deep=True) if listing is None else listing
        selection = layout.select(repo, names, form=form, file=file, weights=weights)
    except WeightsError:
        return None
    if listing is None and selection.form == "gguf" and file is None and form is None:
        return None
    if headers and not is_complete(folder, selection, listing or {}, weights=weights):
        folder = cached.headers(commit)
    if cached.lacks_listed(commit, selection) or not is_complete(folder, selection, listing or {}, weights=weights):
        return None
    cached.mark_used(commit)
    return selection.path(folder)


def is_complete(folder: Path, selection: Selection, sizes: Listing, *, weights: bool) -> bool:
    """Whether `folder` holds all that is selected and, if `weights` are wanted, every weights file in full.

    What was noted of a repository says which small files it has; where nothing was, those that are here are all.
    """
    files = selection.weights if selection.form == "gguf" else selection.side
    if not all((folder / name).is_file() and has_size(folder / name, sizes.get(name)) for name in files):
        return False
    if selection.form == "gguf":
        return True
    if not any((folder / name).is_file() for name in layout.TOKENIZERS):
        return False
    try:
        return not weights or all(is_whole(path) for path in weight_files.in_folder(folder, selection.form))
    except WeightsError:
        return False


def has_size(path: Path, size: int | None) -> bool:
    """Whether the file has that many bytes; None is any number."""
    return size is None or path.stat().st_size == size


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


def has_hash(
    path: Path, *, sha256: str | None = None, sha1: str | None = None, report: Callable[[int, int], None] | None = None
) -> bool:
    """Whether the file is what the Hub says it is; True where the Hub says nothing. `sha1` is git's, of a blob.

    `report` is told the bytes that were read, and all.
    """
    if sha256 is None and sha1 is None:
        return True
    done, size = 0, path.stat().st_size
    digest = hashlib.sha256() if sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if report is not None:
                report(done, size)
    return digest.hexdigest() == (sha256 or sha1)


def snapshot_of(path: Path) -> Path | None:
    """The snapshot in which the file `path` lies, in the Hub's cache or in our own."""
    return next((folder for folder in path.absolute().parents if folder.parent.name == SNAPSHOTS), None)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Inside, write to the given path: at the end it becomes `path`, and after an error nothing is left of it.

    A reader sees what was there before or all of the new, never half. Folders are made. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(6)}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def link(source: Path, target: Path) -> None:
    """Make `target` lead to `source`; a copy where there are no links. It is there whole, or as it was."""
    with replacing(target) as temporary:
        try:
            temporary.symlink_to(os.path.relpath(source, target.parent))
        except OSError:
            shutil.copyfile(source, temporary)


# A stamp says that this machine has seen a file whole, so that its hashes are checked once. It is a file of one line,
# named after the path: the hash of the content, size, time of change, inode, path. Whoever changes the file changes
# that time (ctime: unlike the content's own, nobody can set it back), and it is checked again. The stamp's own time is
# when the file was last used. So stamps also say where serialized models lie that were written to a place of the
# user's.


def is_stamped(path: Path, content: bytes) -> bool:
    """Whether the file of that content hash was written or checked here and has not been touched since."""
    with suppress(OSError):
        stamp = _stamp(path)
        if stamp.read_bytes() == _stamp_line(path, content):
            os.utime(stamp)
            return True
    return False


def write_stamp(path: Path, content: bytes) -> None:
    """Note that the file is whole as it stands. Without a writable cache it will be checked again, no more."""
    with suppress(OSError), replacing(_stamp(path)) as temporary:
        temporary.write_bytes(_stamp_line(path, content))


def stamped_files() -> Iterator[Path]:
    """The files that have a stamp and are there; of those that are not, the stamp is removed."""
    with suppress(OSError):
        for stamp in sorted((own_cache_folder() / STAMPS).iterdir()):
            with suppress(OSError):
                path = Path(os.fsdecode(stamp.read_bytes().split(b" ", STAMP_FIELDS)[-1]))
                if stamp == _stamp(path) and path.is_file():
                    yield path
                else:
                    stamp.unlink()


def stamped_at(path: Path) -> float | None:
    """When the file was last written, checked or loaded, in seconds since 1970, or None."""
    with suppress(OSError):
        return _stamp(path).stat().st_mtime
    return None


def _stamp(path: Path) -> Path:
    return own_cache_folder() / STAMPS / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()


def _stamp_line(path: Path, content: bytes) -> bytes:
    found = path.stat()
    numbers = f"{content.hex()} {found.st_size} {found.st_ctime_ns} {found.st_ino} "
    return numbers.encode() + os.fsencode(path.resolve())
