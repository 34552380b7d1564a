"""A model's name in, one complete local folder out. Knows no tensors' names and no terminal.

`huggingface_hub` does the transfer (mirrors, tokens, proxies, retries, file locks); it is imported only when the
network is needed. One format is fetched, never two, and never a file that no one here would open.
"""

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import layout, store
from .errors import DiskFull, DownloadFailed, ModelNotFound, Offline
from .transfer import Progress, Transfer

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository of the Hub at a revision: `owner/name`, or `owner/name@revision` as people write it."""

    name: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"


def fetch(name: str, *, weights: bool = True, force: bool = False, progress: Progress | None = None) -> Path:
    """The local folder of the model `name`.

    A path that exists is returned as it is. Otherwise `name` is `owner/name` on the Hub, `owner/name@revision` for
    another branch, tag or commit. What is cached completely is used without any network call: a newer version on the
    Hub is not looked for, unless `force` fetches everything anew. `weights=False` asks for the small files only.

    Raises ModelNotFound, Offline (HF_HUB_OFFLINE), Gated, DownloadFailed, DiskFull, and the errors of layout for a
    repository that has no weights in Hugging Face form.
    """
    path = os.path.expanduser(name)
    if os.path.exists(path):  # unlike Path.exists, False for what can be no path at all
        return Path(path)
    repo = parse(name)
    if not force and (folder := store.find(repo.name, repo.revision, weights=weights)):
        return folder
    if is_offline():
        raise Offline(str(repo), store.cache_folder(), forced=force)
    return _download(repo, weights=weights, force=force, progress=progress)


def parse(name: str) -> Repo:
    """`owner/name` or `owner/name@revision`. Raises ModelNotFound for what looks like a path, or like no name."""
    match = NAME.fullmatch(name)
    if match and ".." not in name:
        return Repo(match["repo"], match["revision"] or "main")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelNotFound(name, "no such file or folder", "Check the path, or give a Hub name such as owner/name.")
    advice = "Give a folder that exists, or a name such as mistral-community/pixtral-12b."
    raise ModelNotFound(name, "it is no folder here, and no Hub name, which is owner/name", advice)


def is_offline() -> bool:
    """Whether the environment forbids the network, by the variables that the Hub's library honours."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in TRUE


def _download(repo: Repo, *, weights: bool, force: bool, progress: Progress | None) -> Path:
    """Small files first, config.json the last of them, then the weights; then only does the revision point here.

    An index comes before all: it says which weights there are, and so how many bytes.
    """
    transfer = Transfer(repo.name, repo.revision, label=str(repo), report=progress)
    sizes = transfer.listing()
    if layout.CONFIG not in sizes:
        raise layout.no_config(str(repo), sizes)
    chosen = layout.hf_weights(sizes) if weights else []
    if weights and not chosen:
        raise layout.no_weights(str(repo), sizes)

    wanted = store.wanted_side_files(sizes) + _weight_names(transfer, chosen, force)
    _get(transfer, wanted, force)
    store.write_ref(repo.name, repo.revision, transfer.commit)
    return store.snapshot(repo.name, transfer.commit)


def _weight_names(transfer: Transfer, chosen: list[str], force: bool) -> list[str]:
    """The safetensors files to fetch; with an index, which is fetched at once, the shards that it names."""
    if chosen != [layout.INDEX]:
        return chosen
    index = store.snapshot(transfer.repo, transfer.commit) / layout.INDEX
    if force or not index.is_file():
        transfer.get([layout.INDEX], force=force, quietly=True)
    names = sorted(layout.shards(index))
    if absent := [name for name in names if name not in transfer.sizes]:
        advice = "Tell the model's owner, or try another revision: owner/name@revision."
        raise DownloadFailed(transfer.label, f"its index names {absent[0]}, which the repository lacks", advice)
    return names


def _get(transfer: Transfer, names: Iterable[str], force: bool) -> None:
    """Fetches those of `names` that are not here in full, after a look at the room on the disk."""
    folder = store.snapshot(transfer.repo, transfer.commit)
    missing = [name for name in names if force or not store.is_whole(folder / name)]
    _check_room(transfer, missing)
    transfer.get(missing, force=force)
    for name in missing:
        if not store.is_whole(folder / name):
            raise DownloadFailed(transfer.label, f"{name} arrived with another length than its header says")


def _check_room(transfer: Transfer, names: Iterable[str]) -> None:
    needed = sum(transfer.sizes.get(name) or 0 for name in names)
    existing = next(p for p in (store.cache_folder(), *store.cache_folder().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DiskFull(transfer.label, existing, needed, free)
