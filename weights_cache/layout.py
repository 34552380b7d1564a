"""A folder or a list of paths in, the weights files that count out. Knows file names, not what is in the files
(but for the index of shards, which is checked here)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import CheckpointCorrupt, NotYetSupported, PickleRefused, WeightsError, WeightsNotFound
from .json_file import read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NATIVE = "consolidated"
"""Files whose name begins so are Mistral's own form."""

NOT_YET: Mapping[str, str] = {".gguf": "a GGUF file"}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")


def weight_files(folder: Path) -> dict[Path, frozenset[str]]:
    """The safetensors files of `folder` in Hugging Face form -> the names that its index expects in each.

    First `model.safetensors`, then the shards of `model.safetensors.index.json`, then whatever other safetensors
    files lie there, Mistral's own never. Raises WeightsNotFound, NotYetSupported, PickleRefused or CheckpointCorrupt.
    """
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: frozenset()}
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    others = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith((NATIVE, "adapter_")))
    if not others:
        raise no_weights(folder)
    _check_numbering(others)
    return dict.fromkeys(others, frozenset())


def chosen_files(paths: Sequence[Path]) -> dict[Path, frozenset[str]]:
    """As weight_files, for paths that someone named: safetensors files, and folders of them."""
    found: dict[Path, frozenset[str]] = {}
    for path in paths:
        if path.is_dir():
            found |= weight_files(path)
        elif not path.is_file():
            raise WeightsNotFound(path.parent, f"file {path.name}", "Check the path of the weights.")
        else:
            found[_readable(path)] = frozenset()
    return found


def no_weights(folder: Path) -> WeightsError:
    """The error that says best why `folder` gives no weights in Hugging Face form."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    if native := next((p for p in files if p.name.startswith(NATIVE) and p.suffix == ".safetensors"), None):
        return NotYetSupported(native, "in Mistral's native form")
    if known := next((p for p in files if p.suffix in NOT_YET), None):
        return NotYetSupported(known, NOT_YET[known.suffix])
    if pickle := next((p for p in files if p.suffix in PICKLES), None):
        return PickleRefused(pickle)
    return WeightsNotFound(
        folder, "weights: looked for model.safetensors, its index and other *.safetensors files"
    )


def _readable(path: Path) -> Path:
    """`path`, if it is a safetensors file by its name."""
    if path.suffix in NOT_YET:
        raise NotYetSupported(path, NOT_YET[path.suffix])
    if path.suffix in PICKLES:
        raise PickleRefused(path)
    if path.suffix != ".safetensors":
        raise WeightsNotFound(
            path, "name ending in .safetensors", "Give a *.safetensors file, or a folder of them."
        )
    return path


def _shards(index: Path) -> dict[Path, frozenset[str]]:
    """The files that `index` names, all present -> the tensors that it says are in each."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointCorrupt(index, "it has no weight_map")
    expected: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or "\\" in file
            or not file.endswith(".safetensors")
        ):
            raise CheckpointCorrupt(
                index, f"it puts {name[:200]!r} into {str(file)[:200]!r}, which is no shard's name"
            )
        expected.setdefault(index.parent / file, set()).add(name)
    missing = sorted(path.name for path in expected if not path.is_file())
    if missing:
        raise CheckpointCorrupt(
            index.parent, f"its index names {_all_of(missing)}, and {_pronoun(missing)} not there"
        )
    return {path: frozenset(names) for path, names in sorted(expected.items())}


def _check_numbering(files: Sequence[Path]) -> None:
    """Shards without an index say in their names how many there should be."""
    for match in filter(None, (SHARD.fullmatch(path.name) for path in files)):
        total = int(match["total"])
        for number in range(1, min(total, 9999) + 1):
            shard = f"{match['stem']}-{number:05d}-of-{total:05d}.safetensors"
            if not (files[0].parent / shard).is_file():
                raise CheckpointCorrupt(files[0].parent, f"its shard {shard} is not there")


def _all_of(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _pronoun(names: Sequence[str]) -> str:
    return "it is" if len(names) == 1 else "they are"
