"""Weights files in, their tensors under our names out. Knows no config but for the heads' sizes.

Formats meet here: a reader for each file, and for each form a table of names and the order of its rotary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import configs, file_kind, layout, names, quantized_elsewhere, weight_files
from .errors import CheckpointCorrupt, FilesMismatch, WeightsNotFound
from .formats.gguf import GgufFile
from .formats.reader import Reader, TensorInfo
from .formats.safetensors import E4M3, SafetensorsFile
from .json_fields import read_json_object

if TYPE_CHECKING:
    from torch import Tensor

    from .packed import PackedWeight


class Stored(NamedTuple):
    """Where a tensor of ours lies: in which file, under which name; `head_dim` if its rows are to be reordered."""

    reader: Reader
    name: str
    head_dim: int | None = None

    @property
    def info(self) -> TensorInfo:
        return self.reader.tensors[self.name]

    def weight(self) -> Tensor | PackedWeight:
        """As it is stored, memory-mapped; its rows in our order, copied where that is another."""
        weight = self.reader.weight(self.name)
        if self.head_dim is None:
            return weight
        from . import packed

        rows, head_dim = weight.shape[0], self.head_dim
        if head_dim < 2 or head_dim % 2 or rows % head_dim:
            reason = f"tensor {self.name!r} has {rows} rows, and its heads have {head_dim}"
            raise CheckpointCorrupt(self.info.file, reason)
        ordered = packed.with_rows(weight, lambda part: names.halves(part, head_dim))
        self.reader.release(self.name)  # nobody needs the original beside the copy
        return ordered


class Naming(NamedTuple):
    """How a file's tensors become ours: their names, and rows of one head where rotary rows lie interleaved."""

    ours: Callable[[str], str | None]
    head_dims: Mapping[str, int]


def stored(chosen: weight_files.Expected) -> dict[str, Stored]:
    """Our names -> where the tensors lie, of the files `chosen`. Of a tensor that an index promises in one of them,
    other copies are left out: a shard may be older than the index."""
    promised = frozenset[str]().union(*chosen.values())
    found: dict[str, Stored] = {}
    opened = [_open(path, here, promised - here if here else frozenset()) for path, here in chosen.items()]
    for reader, naming in _merged(opened):
        for name in reader.tensors:
            if ours := naming.ours(name):
                _put(found, ours, Stored(reader, name, naming.head_dims.get(names.rotary_part(ours) or "")))
    return found


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


def _native_naming(path: Path) -> Naming:
    """A native file's rows can be put in order only by its params.json."""
    params = path.parent / layout.NATIVE_CONFIG
    if not params.is_file():
        advice = f"{path.name} is in Mistral's own form, which takes its sizes from {params.name}: put it there."
        raise WeightsNotFound(path.parent, params.name, advice)
    described = read_json_object(params)
    quantized_elsewhere.refuse(path.parent, described)
    return Naming(names.from_native, configs.head_dims(configs.from_native(params, described)))


def _merged(opened: list[tuple[Reader, Naming]]) -> list[tuple[Reader, Naming]]:
    """`opened`; where layers are in bitsandbytes' encoding or in FP8, one over all files of a kind, since what belongs
    together may lie apart."""
    if names.looks_bitsandbytes(name for reader, _ in opened for name in reader.tensors):
        from .formats.bitsandbytes import BitsandbytesFiles

        return [(BitsandbytesFiles([reader for reader, _ in opened]), Naming(names.from_hf, {}))]
    kinds = {naming.ours: naming for reader, naming in opened if _holds_fp8(reader)}
    if not kinds:
        return opened
    from .formats.fp8 import Fp8Files

    others = [(reader, naming) for reader, naming in opened if naming.ours not in kinds]
    return others + [(Fp8Files([reader for reader, of in opened if of.ours is ours]), kinds[ours]) for ours in kinds]


def _holds_fp8(reader: Reader) -> bool:
    return any(info.dtype == E4M3 for info in reader.tensors.values())


def _put(found: dict[str, Stored], ours: str, stored: Stored) -> None:
    if other := found.get(ours):
        path, first = stored.info.file, other.info.file
        if path == first:
            raise CheckpointCorrupt(path, f"its {stored.name!r} is the same tensor as its {other.name!r}")
        reason = f"{stored.name!r} of the first is the same tensor as {other.name!r} of the second"
        raise FilesMismatch(path, reason, first)
    found[ours] = stored
