"""A model's folder in; its config, side files and tensors under our names out. Knows no architecture.

Headers are read when tensors are first asked for, so that a folder without weights serves whoever needs only the
tokenizer. Formats meet here: a reader per file, a table of names per format.
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

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


class Stored(NamedTuple):
    """Where a tensor of ours lies: which file, under which name."""

    reader: Reader
    name: str


class Checkpoint:
    """An opened model folder. `config` and `generation_config` are the JSON files as they are ({} if absent)."""

    form: Literal["hf", "native"] = "hf"

    def __init__(self, folder: Path, config: dict[str, Any], weight_paths: Sequence[Path] = ()):
        self.folder = folder
        self.config = config
        self.weight_paths = tuple(weight_paths)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        path = self.file(GENERATION_CONFIG)
        return read_json_object(path) if path else {}

    def file(self, name: str) -> Path | None:
        """The path of the side file `name` ("tokenizer.json", …), or None when the folder has none."""
        path = self.folder / name
        return path if path.is_file() else None

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Our names -> TensorInfo, from headers only. Raises a WeightsError when there is nothing to trust."""
        return {
            ours: TensorInfo(ours, info.dtype, info.shape, info.nbytes, info.file)
            for ours, stored in self._stored.items()
            for info in (stored.reader.tensors[stored.name],)
        }

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor that we call `name`, memory-mapped, in the shape and dtype of the file. KeyError if unknown."""
        stored = self._stored[name]
        return stored.reader.tensor(stored.name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        expected = (
            layout.chosen_files(self.weight_paths) if self.weight_paths else layout.weight_files(self.folder)
        )
        found: dict[str, Stored] = {}
        for path, promised in expected.items():
            reader = _open_reader(path, promised)
            for name in reader.tensors:
                if ours := names.from_hf(name):
                    _put(found, ours, Stored(reader, name), path)
        return found


def open(folder: Path, weight_paths: Sequence[Path] = ()) -> Checkpoint:
    """The checkpoint in `folder`; files or folders in `weight_paths` replace the folder's own weights.

    Raises WeightsNotFound (no folder, no config.json), NotYetSupported (only native files, or a GGUF),
    CheckpointCorrupt (config.json is no JSON object). Weights are looked at when tensors are asked for.
    """
    folder = Path(folder)
    if folder.suffix in layout.NOT_YET and folder.is_file():
        raise NotYetSupported(folder, layout.NOT_YET[folder.suffix])
    if not folder.is_dir():
        raise WeightsNotFound(
            folder, CONFIG + ": it is not a folder", "Give the folder that holds config.json."
        )
    if not (folder / CONFIG).is_file():
        raise _no_config(folder)
    return Checkpoint(folder, read_json_object(folder / CONFIG), [Path(path) for path in weight_paths])


def _no_config(folder: Path) -> Exception:
    if (folder / "params.json").is_file():
        return NotYetSupported(folder, "in Mistral's native form (params.json)")
    if isinstance(error := layout.no_weights(folder), NotYetSupported):
        return error
    return WeightsNotFound(
        folder,
        f"{CONFIG} (looked for {folder / CONFIG})",
        "Give the folder that holds config.json and *.safetensors.",
    )


def _open_reader(path: Path, promised: frozenset[str]) -> Reader:
    """The reader for `path`, which must hold the tensors that an index `promised`."""
    reader = SafetensorsFile(path)
    if names.looks_native(reader.tensors):
        raise NotYetSupported(path, "in Mistral's native form")
    if lacking := sorted(promised - reader.tensors.keys()):
        raise CheckpointCorrupt(path, f"the index puts {lacking[0]!r} into it, and it is not there")
    return reader


def _put(found: dict[str, Stored], ours: str, stored: Stored, path: Path) -> None:
    if other := found.get(ours):
        first = other.reader.tensors[other.name].file
        raise CheckpointCorrupt(path, f"its {stored.name!r} is the same tensor as {other.name!r} in {first}")
    found[ours] = stored
