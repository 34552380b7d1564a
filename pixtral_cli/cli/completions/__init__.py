"""What Tab offers for the value of a flag. Reads the names of files and folders only: no model, no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pixtral_cli.known_models import BUILT_IN, DEFAULT_MODEL

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
NVIDIA_GPU = re.compile(r"nvidia\d+")
FOLDERS = ("/",)


@dataclass(frozen=True)
class Values:
    """`words` are known when a script is made; `listing`, a key of LISTINGS, names what only the program knows.

    `files` are the endings of the files that fit, beside any folder: () for all files, FOLDERS for none of them,
    None where a path makes no sense.
    """

    words: tuple[str, ...] = ()
    listing: str | None = None
    files: tuple[str, ...] | None = None

    def offered(self, incomplete: str) -> list[str]:
        """The words that begin with `incomplete`, for Typer's own completion; files are left to the shell."""
        listed = listed_now(self.listing) if self.listing else ()
        return [word for word in (*self.words, *listed) if word.startswith(incomplete)]


def listed_now(name: str) -> tuple[str, ...]:
    """The models, files or devices that there are now, each once."""
    return tuple(dict.fromkeys(LISTINGS[name]()))


def _models() -> Iterable[str]:
    """What `--model-path` takes: the built-in model, the default one, and those in the Hub's cache."""
    from weights_cache import inventory

    return [BUILT_IN, DEFAULT_MODEL, *inventory.hub_names()]


def _serialized() -> Iterable[str]:
    """Files that `pixtral export` wrote."""
    from weights_cache import inventory

    here = os.path.join(os.getcwd(), "")
    return [str(path).removeprefix(here) for path in inventory.serialized_files()]


def _cached() -> Iterable[str]:
    """Models under the names that `pixtral cache list` prints."""
    from weights_cache import inventory

    return [*inventory.hub_names(), *inventory.serialized_files().values()]


def _devices() -> Iterable[str]:
    return ["cpu", "gpu", *(f"gpu-{number}" for number in range(count_gpus(Path("/dev"))))]


def count_gpus(folder: Path) -> int:
    """NVIDIA's GPUs by their device files, and no more of them than CUDA_VISIBLE_DEVICES lets a program see."""
    here = sum(bool(NVIDIA_GPU.fullmatch(file.name)) for file in folder.iterdir())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return here if visible is None else min(here, len([name for name in visible.split(",") if name.strip()]))


LISTINGS: dict[str, Callable[[], Iterable[str]]] = {
    "models": _models,
    "serialized": _serialized,
    "all-models": lambda: [*_models(), *_serialized()],
    "cached": _cached,
    "devices": _devices,
}
FILES, FOLDER = Values(files=()), Values(files=FOLDERS)
IMAGE, CONVERSATION, WEIGHTS = (
    Values(files=IMAGE_ENDINGS),
    Values(files=("json",)),
    Values(files=("safetensors", "gguf")),
)
MODEL, ANY_MODEL = Values(listing="models", files=("gguf",)), Values(listing="all-models", files=())
CACHED, SERIALIZED = Values(listing="cached"), Values(listing="serialized", files=())
DEVICES = Values(listing="devices")
