"""Where downloaded models live on disk, in the layout that the Hub's own library uses. Knows no network.

    <cache>/models--owner--name/refs/main                    a commit
    <cache>/models--owner--name/snapshots/<commit>/<file>    links to blobs
    <cache>/models--owner--name/trees/<commit>.json          what the repository holds (huggingface_hub >= 2)

Reading this needs no import of huggingface_hub (0.1 s), so a cached model starts at once and offline.
"""

import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from . import layout
from .errors import CheckpointCorrupt, WeightsError
from .json_file import read_json_object
from .safetensors_reader import SafetensorsFile

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""The small files that are fetched beside config.json; the rest of a repository is left alone."""

TOKENIZERS = ("tokenizer.json", "tekken.json")
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
    return repo_folder(repo) / "snapshots" / commit


def find(repo: str, revision: str, *, weights: bool) -> Path | None:
    """The snapshot of `repo` at `revision` (a branch, tag or commit) if it is here and complete, else None."""
    commit = _commit(repo, revision)
    if not commit:
        return None
    folder = snapshot(repo, commit)
    return folder if is_complete(folder, weights=weights) and not _lacks_listed(repo, commit) else None


def is_complete(folder: Path, *, weights: bool) -> bool:
    """Whether `folder` holds a config and a tokenizer and, if `weights` are wanted, every weights file in full.

    The downloader here writes config.json after all other small files: where it is, they are.
    """
    if not (folder / layout.CONFIG).is_file() or not any((folder / name).is_file() for name in TOKENIZERS):
        return False
    if not weights:
        return True
    try:
        return all(is_whole(path) for path in layout.weight_files(folder))
    except WeightsError:
        return False


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
    path = repo_folder(repo) / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_text(commit)
    temporary.replace(path)


def wanted_side_files(names: Iterable[str]) -> list[str]:
    """Which of a repository's files are fetched beside the weights; config.json comes last."""
    present = set(names)
    return [name for name in (*SIDE_FILES, layout.CONFIG) if name in present]


def _commit(repo: str, revision: str) -> str | None:
    if COMMIT.fullmatch(revision):
        return revision
    try:
        commit = (repo_folder(repo) / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def _lacks_listed(repo: str, commit: str) -> bool:
    """Whether the library's listing of the repository, where it left one, names a side file that is not here."""
    listing = repo_folder(repo) / "trees" / f"{commit}.json"
    if not listing.is_file():
        return False
    try:
        files = read_json_object(listing).get("files", {})
    except CheckpointCorrupt:
        return False
    return any(not (snapshot(repo, commit) / name).is_file() for name in wanted_side_files(files))
