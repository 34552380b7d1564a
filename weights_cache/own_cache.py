"""Where our own files live, beside the Hub's cache. Knows no network and no format.

    <own>/hub/models--owner--name/<commit>.json    what the repository holds: {file name: bytes}
    <own>/hub/models--owner--name/<commit>.used    empty; its time is when the model was last asked for
    <own>/hub/models--owner--name/snapshots/<commit>/<file>.gguf    as long as the file, with its header only
    <own>/models/                                  models that were encoded once and saved here
    <own>/stamps/                                  see stamps.py

Listings say what a snapshot lacks without a network call. All of it can be deleted at any time.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .errors import CheckpointCorrupt
from .json_fields import read_json_object
from .replacing import replacing

Listing = Mapping[str, int | None]
"""A repository's file names -> sizes in bytes, None where nobody said."""


def own_cache_folder() -> Path:
    """PIXTRAL_CACHE, else $XDG_CACHE_HOME/pixtral, else ~/.cache/pixtral. It need not exist."""
    chosen = os.environ.get("PIXTRAL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pixtral"
    return Path(os.path.expandvars(chosen)).expanduser()


def models_folder() -> Path:
    """Where encoded models are kept."""
    return own_cache_folder() / "models"


def repo_folder(repo: str) -> Path:
    """What is remembered of the repository `owner/name`."""
    return own_cache_folder() / "hub" / ("models--" + repo.replace("/", "--"))


def headers_folder(repo: str, commit: str) -> Path:
    """Where the headers of its GGUF files lie that were fetched without the rest."""
    return repo_folder(repo) / "snapshots" / commit


def write_listing(repo: str, commit: str, files: Listing) -> None:
    """Remember what the repository holds; without it all works, with more questions to the Hub."""
    with suppress(OSError), replacing(repo_folder(repo) / f"{commit}.json") as temporary:
        temporary.write_text(json.dumps(dict(files)))


def listing(repo: str, commit: str) -> Listing | None:
    """What the repository holds, or None when it was not remembered."""
    path = repo_folder(repo) / f"{commit}.json"
    if not path.is_file():
        return None
    try:
        found = read_json_object(path)
    except CheckpointCorrupt:
        return None
    return {name: size if isinstance(size, int) else None for name, size in found.items()}


def mark_used(repo: str, commit: str) -> None:
    """The model was asked for now. File systems often do not say (noatime), so it is written down."""
    path = repo_folder(repo) / f"{commit}.used"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def last_used(repo: str, commit: str) -> float | None:
    """When the model was last asked for, in seconds since 1970, or None."""
    try:
        return (repo_folder(repo) / f"{commit}.used").stat().st_mtime
    except OSError:
        return None
