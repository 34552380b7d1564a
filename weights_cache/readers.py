"""Weights files in, for each its reader and how its tensors become ours out: their names, and the order of their rows.

Formats meet here: a reader per file, a table of names and the order of rotary rows per format.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from . import configs, file_kind, layout, names, quantization
from .errors import CheckpointCorrupt, WeightsNotFound
from .formats.gguf import GgufFile
from .formats.reader import Reader
from .formats.safetensors import SafetensorsFile
from .json_fields import read_json_object
from .weight_files import Expected


class Naming(NamedTuple):
    """How a file's tensors become ours: their names, and rows of one head where rotary rows lie interleaved."""

    ours: Callable[[str], str | None]
    head_dims: Mapping[str, int]


def opened(chosen: Expected) -> list[tuple[Reader, Naming]]:
    """The readers of the files `chosen`. Of a tensor that an index promises in one of them, other copies are left out:
    a shard may be older than the index.
    """
    promised = frozenset[str]().union(*chosen.values())
    return _merged([_open(path, here, promised - here if here else frozenset()) for path, here in chosen.items()])


def _open(path: Path, promised: frozenset[str], left_out: frozenset[str]) -> tuple[Reader, Naming]:
    """The reader for `path`, which must hold the tensors that an index `promised`, and how its tensors become ours."""
    if file_kind.of(path) == "gguf":
        file = GgufFile(path)
        return file, Naming(names.from_gguf, configs.gguf_head_dims(file))
    reader = SafetensorsFile(path, left_out)
    if lacking := sorted(promised - reader.tensors.keys()):
        raise CheckpointCorrupt(path, f"the index puts {lacking[0]!r} into it, and it is not there")
    if path.name.startswith(layout.NATIVE) or names.looks_native(reader.tensors):
        return reader, _native_naming(path)
    return reader, Naming(names.from_hf, {})


def _merged(readers: list[tuple[Reader, Naming]]) -> list[tuple[Reader, Naming]]:
    """`readers`; where bitsandbytes encoded layers, one over all, since what belongs together may lie apart."""
    if not names.looks_bitsandbytes(name for reader, _ in readers for name in reader.tensors):
        return readers
    from .formats.bitsandbytes import BitsandbytesFiles

    return [(BitsandbytesFiles([reader for reader, _ in readers]), Naming(names.from_hf, {}))]


def _native_naming(path: Path) -> Naming:
    """A native file's rows can be put in order only by its params.json."""
    params = path.parent / layout.NATIVE_CONFIG
    if not params.is_file():
        advice = f"{path.name} is in Mistral's own form, which takes its sizes from {params.name}: put it there."
        raise WeightsNotFound(path.parent, params.name, advice)
    described = read_json_object(params)
    quantization.refuse(path.parent, described, ())
    return Naming(names.from_native, configs.head_dims(configs.from_native(params, described)))
