"""A model's folder in; its config, side files and tensors under our names out. Knows no architecture.

Headers are read when tensors are first asked for, so that a folder without weights serves whoever needs only
the tokenizer. Formats meet here: a reader per file, a table of names per format.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from . import layout, names
from .errors import CheckpointCorrupt, NotYetSupported, WeightsNotFound
from .json_file import read_json_object
from .reader import Reader, TensorInfo
from .safetensors_reader import SafetensorsFile

if TYPE_CHECKING:
    import torch

GENERATION_CONFIG = "generation_config.json"


class Stored(NamedTuple):
    """Where a tensor of ours lies: in which file, under which name."""

    reader: Reader
    name: str


class Checkpoint:
    """An opened model folder: `folder`, and `config`, which is its config.json as it is."""

    form: Literal["hf", "native"] = "hf"

    def __init__(self, folder: Path, config: dict[str, Any], weight_paths: Sequence[Path] = ()):
        self.folder = folder
        self.config = config
        self.weight_paths = tuple(weight_paths)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json as it is, {} if the folder has none."""
        path = self.file(GENERATION_CONFIG)
        return read_json_object(path) if path else {}

    def file(self, name: str) -> Path | None:
        """The path of the side file `name` ("tokenizer.json", …), or None when the folder has none."""
        path = self.folder / name
        return path if path.is_file() else None

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Our names -> TensorInfo, from headers only. Raises a WeightsError for what cannot be trusted."""
        return {ours: _renamed(ours, stored) for ours, stored in self._stored.items()}

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor that we call `name`, memory-mapped, in the file's shape and dtype. KeyError if unknown."""
        stored = self._stored[name]
        return stored.reader.tensor(stored.name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        chosen = layout.chosen_files(self.weight_paths) if self.weight_paths else layout.weight_files(self.folder)
        found: dict[str, Stored] = {}
        for path, promised in chosen.items():
            reader = _open_reader(path, promised)
            for name in reader.tensors:
                if ours := names.from_hf(name):
                    _put(found, ours, Stored(reader, name))
        return found


def open(folder: Path, weight_paths: Sequence[Path] = ()) -> Checkpoint:
    """The checkpoint in `folder`; files or folders in `weight_paths` replace the folder's own weights.

    Raises WeightsNotFound (no folder, no config.json), NotYetSupported (only native files, or a GGUF), PickleRefused
    (only pickles), CheckpointCorrupt (config.json is no JSON object). Weights are looked at when asked for.
    """
    folder = Path(folder)
    if folder.suffix in layout.NOT_YET and folder.is_file():
        raise NotYetSupported(folder, layout.NOT_YET[folder.suffix])
    if not folder.is_dir():
        what = "is no folder, so it" if folder.exists() else "does not exist, so it"
        raise WeightsNotFound(f"{folder} {what}", layout.CONFIG, f"Give the folder that holds {layout.CONFIG}.")
    if not (folder / layout.CONFIG).is_file():
        raise layout.no_config(folder, layout.file_names(folder))
    return Checkpoint(folder, read_json_object(folder / layout.CONFIG), [Path(path) for path in weight_paths])


def _open_reader(path: Path, promised: frozenset[str]) -> Reader:
    """The reader for `path`, which must hold the tensors that an index `promised`."""
    reader = SafetensorsFile(path)
    if names.looks_native(reader.tensors):
        raise NotYetSupported(path, "in Mistral's native form")
    if lacking := sorted(promised - reader.tensors.keys()):
        raise CheckpointCorrupt(path, f"the index puts {lacking[0]!r} into it, and it is not there")
    return reader


def _put(found: dict[str, Stored], ours: str, stored: Stored) -> None:
    if other := found.get(ours):
        path, first = (s.reader.tensors[s.name].file for s in (stored, other))
        raise CheckpointCorrupt(path, f"its {stored.name!r} is the same tensor as {other.name!r} in {first}")
    found[ours] = stored


def _renamed(ours: str, stored: Stored) -> TensorInfo:
    info = stored.reader.tensors[stored.name]
    return TensorInfo(ours, info.dtype, info.shape, info.nbytes, info.file)
