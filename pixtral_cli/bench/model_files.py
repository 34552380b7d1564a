"""A model, or the name of a shape, in; files of the same weights as each program reads them out.

A shape, and a model that is wanted in another encoding than its file has, becomes a serialized model first, as `pixtral
export` writes it; what is measured is that file. Files lie in a folder that the caller throws away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pixtral_cli.bench import random_weights
from pixtral_cli.bench.shapes import config_of
from pixtral_cli.encoding_choices import asked_for
from pixtral_cli.model.placement import Placement
from pixtral_cli.source import Source
from weights_cache import file_kind
from weights_cache.progress import Progress


@dataclass(frozen=True)
class Subject:
    """A model that is measured in one encoding: `arguments` are those of `Pixtral.load`, and of `pixtral run`."""

    name: str
    source: Source
    arguments: Mapping[str, str]

    @cached_property
    def placement(self) -> Placement:
        return self.source.placement(None)


def of_shape(shape: str, encoding: str, sees: bool, folder: Path, progress: Progress | None = None) -> Subject:
    """Random weights of one of SHAPES, with Pixtral's tower if it `sees`."""
    path = folder / f"{shape}.{encoding}"
    random_weights.write(config_of(shape, sees), encoding, path, progress)
    return _serialized(shape, path)


def of_model(name: str, encoding: str | None, folder: Path, progress: Progress | None = None) -> Subject:
    """A model by Hub name, folder or file; None is the encoding that it has."""
    path = Path(name)
    if path.is_file() and file_kind.of(path) != "gguf":
        opened = Source.open_serialized(path, progress=progress)
        opened.placement(asked_for(encoding))
        return Subject(name, opened, {"serialized_model_path": name})
    source = Source.open(name, progress=progress)
    placement = source.placement(asked_for(encoding))
    if all(source.checkpoint.tensors[each].encoding == kept for each, kept in placement.encodings.items()):
        return Subject(name, source, {"model_path": name})
    path = folder / f"{path.name}.{placement.label}"
    source.save(path, placement, progress=progress)
    return _serialized(name, path)


def _serialized(name: str, path: Path) -> Subject:
    return Subject(name, Source.open_serialized(path), {"serialized_model_path": str(path)})
