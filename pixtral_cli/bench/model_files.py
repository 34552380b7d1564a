"""A model, or the name of a shape, in; files of the same weights as each program reads them out.

A shape, and a model that is wanted in another encoding than its file has, becomes a serialized model first, as `pixtral
export` writes it; what is measured is that file. Files lie in a folder that the caller throws away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import NamedTuple

from pixtral_cli.bench import gguf_writer, hf_writer, random_weights
from pixtral_cli.bench.shapes import config_of
from pixtral_cli.encoding_choices import asked_for
from pixtral_cli.errors import ModelError
from pixtral_cli.model.free_memory import free_memory
from pixtral_cli.model.load import DTYPES
from pixtral_cli.model.placement import Placement
from pixtral_cli.source import Source
from weights_cache import file_kind
from weights_cache.encodings import ENCODINGS
from weights_cache.progress import Progress
from weights_cache.wording import size


class Peer(NamedTuple):
    """What a program needs: modules, which `pip install PACKAGES` brings, and the model as it reads it."""

    modules: tuple[str, ...]
    packages: str
    prepare: Callable[[Subject, Path], dict[str, str]]
    encoding: str | None = None
    """The only one that it is for."""

    @property
    def installed(self) -> bool:
        return all(find_spec(module) for module in self.modules)


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
    """Random weights of one of SHAPES, with the tower of its family if it `sees`."""
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
    matrices = [info for info in source.checkpoint.tensors.values() if len(info.shape) == 2]
    if encoding is None or all(placement.encodings[info.name] == info.encoding for info in matrices):
        return Subject(name, source, {"model_path": name})
    path = folder / f"{path.name}.{placement.label}"
    source.save(path, placement, progress=progress)
    return _serialized(name, path)


def for_llama_cpp(subject: Subject, folder: Path) -> dict[str, str]:
    """The same weights as GGUF, the file itself if it is one. Raises ModelError for what llama.cpp does not have."""
    opened, config = subject.source.checkpoint, subject.source.config
    files = {kind: folder / f"{kind}.gguf" for kind in ("gguf", "mmproj", "vocabulary")[: 3 if config.vision else 1]}
    if opened.form == "gguf" and opened.folder.is_file() and "model_path" in subject.arguments:
        files["gguf"] = opened.folder
    else:
        gguf_writer.write(opened, config, files["gguf"])
    if config.vision:
        gguf_writer.write_pictures(opened, config, files["mmproj"])
        gguf_writer.write_vocabulary(config, files["vocabulary"])
    return {kind: str(path) for kind, path in files.items()}


def for_transformers(subject: Subject, folder: Path) -> dict[str, str]:
    """The same weights decoded, in the dtype that ours computes in. Raises ModelError when they cannot be had."""
    opened, dtype = subject.source.checkpoint, subject.placement.dtype
    nbytes = ENCODINGS[dtype].block_bytes * sum(prod(info.shape) for info in opened.tensors.values())
    free = free_memory()
    if free is not None and nbytes > free:
        raise ModelError(f"its weights take {size(nbytes)} of memory, and {size(free)} are free.")
    if opened.form == "hf" and "model_path" in subject.arguments and subject.placement.label in DTYPES:
        return {"folder": str(opened.folder), "dtype": dtype}
    path = folder / "transformers"
    hf_writer.write(opened, dtype, path)
    return {"folder": str(path), "dtype": dtype}


def for_bitsandbytes(subject: Subject, folder: Path) -> dict[str, str]:
    """Matrices in nf4 as they are, for transformers, which multiplies them with bitsandbytes' kernels."""
    path, dtype = folder / "bitsandbytes", subject.placement.dtype
    hf_writer.write(subject.source.checkpoint, dtype, path, packed=True)
    return {"folder": str(path), "dtype": dtype}


PEERS: Mapping[str, Peer] = {
    "llama.cpp": Peer(("llama_cpp", "gguf"), "llama-cpp-python gguf", for_llama_cpp),
    "transformers": Peer(("transformers",), "transformers", for_transformers),
    "bitsandbytes": Peer(
        ("transformers", "bitsandbytes", "accelerate"), "transformers accelerate", for_bitsandbytes, "nf4"
    ),
}
"""By name, in the order in which they take turns."""


def _serialized(name: str, path: Path) -> Subject:
    return Subject(name, Source.open_serialized(path), {"serialized_model_path": str(path)})
