"""The weights files of a folder, or of paths that a user named, all present. Reads indexes only."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import file_kind, layout
from .errors import CheckpointCorrupt, PickleRefused, Unreadable, WeightsNotFound
from .json_fields import read_json_object
from .layout import GGUF, SAFETENSORS, Form, Selection
from .wording import listed

Expected = Mapping[Path, frozenset[str]]
"""Weights files -> the tensors that an index promises in each (none where there is no index)."""


def in_folder(folder: Path, form: Form | None) -> Expected:
    """The weights files of `folder` in that form (None: the one that is there).

    Raises WeightsNotFound, PickleRefused, or CheckpointCorrupt with the names of missing shards.
    """
    names = file_names(folder)
    possible = layout.FORMS if form is None else (form,)
    found = next((found for each in possible if (found := layout.weight_names(names, each))), None)
    if found is None:
        raise layout.no_weights(folder, names)
    if found[0] in layout.INDEXES:
        promised = shards(folder / found[0])
        _require(folder, promised)
        return {folder / name: frozenset(tensors) for name, tensors in sorted(promised.items())}
    _require(folder, [shard for name in found for shard in layout.shard_names(name)])
    return {folder / name: frozenset() for name in found}


def chosen(paths: Sequence[Path]) -> Expected:
    """As `in_folder`, for paths that a user named: safetensors and GGUF files, and folders of them."""
    check_present(paths)
    found: dict[Path, frozenset[str]] = {}
    for path in paths:
        if path.is_dir():
            found |= in_folder(path, None)
        else:
            found[_readable(path)] = frozenset()
    return found


def selected(selection: Selection, folder: Path) -> list[str]:
    """The names of a selection's weights files; with an index, which lies in `folder`, of the shards that it names."""
    return sorted(shards(folder / selection.index)) if selection.index else list(selection.weights)


def check_present(paths: Iterable[Path]) -> None:
    """Raise WeightsNotFound for the first path that is neither a file nor a folder."""
    for path in paths:
        if not (path.is_file() or path.is_dir()):
            raise WeightsNotFound(f"{path} does not exist, so it", "weights", "Check the path of the weights.")


def file_names(folder: Path, *, deep: bool = False) -> list[str]:
    """The names of the files in `folder`, sorted; `deep`: those in its folders too, as paths. Raises Unreadable.

    A link whose content is gone is no file.
    """
    try:
        paths = folder.rglob("*") if deep else folder.iterdir()
        return sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())
    except OSError as error:
        raise Unreadable(folder, error.strerror or str(error)) from error


def shards(index: Path) -> dict[str, set[str]]:
    """The shards' file names that `index` gives -> the tensors that it puts into each."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointCorrupt(index, "it has no weight_map")
    found: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise CheckpointCorrupt(index, f"it puts {tensor[:200]!r} into {str(file)[:200]!r}, not a shard's name")
        found.setdefault(file, set()).add(tensor)
    return found


def gguf_shards(path: Path) -> list[Path]:
    """The files of the GGUF that begins at `path`, all present. Raises CheckpointCorrupt with those that are not."""
    names = layout.shard_names(path.name)
    if len(names) > 1:
        _require(path.parent, names)
    return [path.parent / name for name in names]


def mmproj_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """The GGUF files in `folder` that are mmproj files by their names; `deep`: in its folders too."""
    paths = folder.rglob(f"*{GGUF}") if deep else folder.glob(f"*{GGUF}")
    return sorted(path for path in paths if layout.is_mmproj(path.name) and path.is_file())


def _readable(path: Path) -> Path:
    """`path`, if it is a safetensors or GGUF file; of one in several files, the first."""
    kind = file_kind.of(path)
    if kind == "pickle":
        raise PickleRefused(path)
    if kind is None:
        advice = f"Give a *{SAFETENSORS} or *{GGUF} file, or their folder."
        raise WeightsNotFound(path, "header of a safetensors or GGUF file", advice)
    return path.with_name(layout.first_shard(path.name)) if kind == "gguf" else path


def _require(folder: Path, names: Iterable[str]) -> None:
    if missing := sorted(set(names) - set(file_names(folder))):
        few = "a file is" if len(missing) == 1 else "files are"
        raise CheckpointCorrupt(folder, f"{few} missing: {listed(missing)}")
