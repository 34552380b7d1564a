"""Where this program's own files live on disk; the Hub's cache is its own matter (store.py)."""

import os
from pathlib import Path


def own_cache_folder() -> Path:
    """PIXTRAL_CACHE, else $XDG_CACHE_HOME/pixtral, else ~/.cache/pixtral. It need not exist."""
    if chosen := os.environ.get("PIXTRAL_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "pixtral"
