"""A model's name in, one complete local folder (or GGUF file) out. Knows no tensors' names and no terminal.

`huggingface_hub` does the transfer (mirrors, tokens, proxies, retries, file locks); it is imported only when the
network is needed. One format is fetched, never two, and never a file that no one here would open.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import layout, own_cache, store
from .errors import DiskFull, DownloadFailed, ModelNotFound, Offline
from .layout import Form
from .meter import Progress
from .selection import Selection, select
from .transfer import Transfer

NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?(:(?P<file>\w[^:\\]*\.gguf))?",
    re.ASCII,
)
FILES = (layout.GGUF, layout.SAFETENSORS)
TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository of the Hub at a revision, and perhaps a GGUF in it: `owner/name@revision:file.gguf`."""

    name: str
    revision: str = "main"
    file: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return self.name + revision + (f":{self.file}" if self.file else "")


def fetch(
    name: str,
    *,
    weights: bool = True,
    force: bool = False,
    headers: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
    form: Form | None = None,
) -> Path:
    """What to open as the model `name`: a local folder, or a GGUF file.

    A path that exists is returned as it is. Otherwise `name` is `owner/name` on the Hub, `owner/name@revision` for
    another branch, tag or commit, `owner/name:file.gguf` for a GGUF in it, which brings its picture part along. Of
    several forms `form` is fetched, or else the first of "hf", "native", "gguf". What is cached completely is used
    without any network call: a newer version on the Hub is not looked for, unless `force` fetches everything anew.
    `weights=False` asks for the small files only. A GGUF has none, so all of it is fetched, or with `headers` a file
    of its length that holds its header only. `tell` is called with a sentence when one of several was chosen.

    Raises ModelNotFound, Offline (HF_HUB_OFFLINE), Gated, DownloadFailed, DiskFull, and WeightsNotFound or
    PickleRefused for a repository without weights that can be read.
    """
    path = os.path.expanduser(name)
    if os.path.exists(path):  # unlike Path.exists, False for what can be no path at all
        return Path(path)
    repo = parse(name)
    if not force and (found := _cached(repo, weights, form, headers)):
        return found
    if is_offline():
        raise Offline(str(repo), store.cache_folder(), forced=force)
    return _download(repo, weights, force, form, headers, progress=progress, tell=tell)


def fetch_headers(name: str, folder: Path, *, form: Form | None = None, progress: Progress | None = None) -> Path:
    """What to open to read all headers of the model `name`: itself if it is here, else a skeleton of it in `folder`.

    A skeleton has the small files (which are cached) and, for every weights file, a file as long as the real one that
    holds its header and nothing else; on a disk it takes the header's room. Raises as `fetch`.
    """
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Path(path)
    repo = parse(name)
    if found := _cached(repo, True, form):
        return found
    if is_offline():
        raise Offline(str(repo), store.cache_folder())
    transfer = Transfer(repo.name, repo.revision, label=str(repo), report=progress)
    sizes = transfer.listing()
    selection = select(str(repo), sizes, form=form, file=repo.file)
    folder = folder / store.SNAPSHOTS / transfer.commit
    weights = _weight_names(transfer, selection, force=False)
    small = [*selection.side, *([selection.index] if selection.index else [])]
    _get(transfer, selection.side, force=False)
    with transfer.our_errors():
        for small_file in small:
            store.link(store.snapshot(repo.name, transfer.commit) / small_file, folder / small_file)
    transfer.get_headers(weights, folder)
    return selection.path(folder)


def parse(name: str) -> Repo:
    """`owner/name[@revision][:file.gguf]`. Raises ModelNotFound for what looks like a path, or like no name."""
    match = NAME.fullmatch(name)
    if match and ".." not in name and not match["repo"].endswith(FILES):
        return Repo(match["repo"], match["revision"] or "main", match["file"])
    if name.startswith(("/", ".", "~")) or name.endswith(FILES) or name.count("/") > 1 or "\\" in name:
        raise ModelNotFound(name, "no such file or folder", "Check the path, or give a Hub name such as owner/name.")
    advice = "Give a folder that exists, or a name such as mistral-community/pixtral-12b."
    raise ModelNotFound(name, "it is no folder here, and no Hub name, which is owner/name", advice)


def is_offline() -> bool:
    """Whether the environment forbids the network, by the variables that the Hub's library honours."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in TRUE


def _cached(repo: Repo, weights: bool, form: Form | None, headers: bool = False) -> Path | None:
    """What is here completely; without a network, a form that is here rather than the preferred one that is not."""
    others = layout.FORMS if form is None and repo.file is None and is_offline() else ()
    for each in (form, *others):
        if found := store.find(repo.name, repo.revision, weights=weights, form=each, file=repo.file, headers=headers):
            return found
    return None


def _download(
    repo: Repo,
    weights: bool,
    force: bool,
    form: Form | None,
    headers: bool,
    *,
    progress: Progress | None,
    tell: Callable[[str], None] | None,
) -> Path:
    """Small files first, the config the last of them, then the weights; then only does the revision point here.

    An index comes before all: it says which weights there are, and so how many bytes.
    """
    transfer = Transfer(repo.name, repo.revision, label=str(repo), report=progress)
    sizes = transfer.listing()
    selection = select(str(repo), sizes, form=form, file=repo.file, weights=weights)
    if selection.note and tell:
        tell(selection.note)
    own_cache.mark_used(repo.name, transfer.commit)
    own_cache.write_listing(repo.name, transfer.commit, sizes)  # else a GGUF whose picture part is to come looks whole
    wanted, folder = list(selection.side), store.snapshot(repo.name, transfer.commit)
    if weights or selection.entry:
        wanted += _weight_names(transfer, selection, force)
    if headers and selection.entry:
        folder = own_cache.headers_folder(repo.name, transfer.commit)
        transfer.get_headers(wanted, folder)
    else:
        _get(transfer, wanted, force)
    with transfer.our_errors():
        store.write_ref(repo.name, repo.revision, transfer.commit)
    return selection.path(folder)


def _weight_names(transfer: Transfer, selection: Selection, force: bool) -> list[str]:
    """The weights files to fetch; with an index, which is fetched at once, the shards that it names."""
    names = list(selection.weights)
    if selection.index:
        index = store.snapshot(transfer.repo, transfer.commit) / selection.index
        if force or not index.is_file():
            transfer.get([selection.index], force=force, quietly=True)
        names = sorted(layout.shards(index))
    if absent := [name for name in names if name not in transfer.sizes]:
        advice = "Tell the model's owner, or try another revision: owner/name@revision."
        why = "its index" if selection.index else f"{names[0]} is one of {len(names)} files, which"
        raise DownloadFailed(transfer.label, f"{why} names {absent[0]}, which the repository lacks", advice)
    return names


def _get(transfer: Transfer, names: Iterable[str], force: bool) -> None:
    """Fetches those of `names` that are not here in full, after a look at the room on the disk."""
    folder = store.snapshot(transfer.repo, transfer.commit)
    missing = [name for name in names if force or not transfer.has(name)]
    _check_room(transfer, missing)
    transfer.get(missing, force=force)
    for name in missing:
        if not store.is_whole(folder / name):
            raise DownloadFailed(transfer.label, f"{name} arrived with another length than its header says")


def _check_room(transfer: Transfer, names: Iterable[str]) -> None:
    needed = sum(transfer.remaining(name) for name in names)
    existing = next(p for p in (store.cache_folder(), *store.cache_folder().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DiskFull(transfer.label, existing, needed, free)
