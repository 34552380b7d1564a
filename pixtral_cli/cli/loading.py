"""Flags in, a loaded model out, saved as one file if that is asked for. Shared by every command that loads one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pixtral_cli.cli.console import Console
from pixtral_cli.cli.flags import UsageError
from pixtral_cli.cli.options import SourceFlags, WeightFlags
from weights_cache import file_kind

if TYPE_CHECKING:
    from pixtral_cli.api import Pixtral

NO_REMOTE_CODE = "--trust-remote-code has no effect: code from a repository is never run."


def load(source: SourceFlags, weights: WeightFlags, console: Console, **more: Any) -> Pixtral:
    """The model that the flags name, with bars while it downloads, loads and is saved; what was chosen is told."""
    weights.check()
    file = weights.serialized_model_path
    if file is not None and any((_named(source), weights.weight_path, source.weights_format)):
        raise UsageError("--serialized-model-path is a whole model: leave --model-path and --weight-path out.")
    if file is not None and source.force_download:
        raise UsageError("--serialized-model-path is a file here: --force-download has nothing to download.")
    with notes_instead_of_log(), console.progress(f"loading {label(source, weights)}") as progress:
        from pixtral_cli import Pixtral

        model = Pixtral.load(
            _model_path(source, weights),
            weight_paths=tuple(weights.weight_path or ()),
            weights_format=source.form,
            serialized_model_path=file,
            quantization_encoding=weights.quantization_encoding,
            quantize_vision=weights.quantize_vision,
            double_quantization=weights.double_quantization,
            devices=weights.devices,
            max_length=weights.max_length,
            max_batch_size=weights.max_batch_size,
            max_ce_batch_size=weights.max_ce_batch_size,
            kv_cache_dtype=weights.kv_cache_dtype,
            speculative=weights.speculative,
            image_preprocessing=source.image_preprocessing,
            force_download=source.force_download,
            progress=progress,
            **more,
        )
        if weights.save_to_serialized_model_path is not None:
            model.save(weights.save_to_serialized_model_path, progress)
    for note in model.notes:
        console.notice(note)
    return model


@contextmanager
def notes_instead_of_log() -> Iterator[None]:
    """Inside, what the model's code would log is not shown: it is among the notes that a command tells."""
    log, nowhere = logging.getLogger("pixtral_cli.model"), logging.NullHandler()
    log.addHandler(nowhere)
    log.propagate, before = False, log.propagate
    try:
        yield
    finally:
        log.propagate = before
        log.removeHandler(nowhere)


def label(source: SourceFlags, weights: WeightFlags) -> str:
    """What is loaded, for people."""
    return str(weights.serialized_model_path or _model_path(source, weights) or "a GGUF")


def _model_path(source: SourceFlags, weights: WeightFlags) -> str | None:
    """The model's name. A GGUF among the weights, and no model named, is a model of its own."""
    brings_its_own = _named(source) is None and any(file_kind.of(path) == "gguf" for path in weights.weight_path or ())
    return None if brings_its_own else source.name


def _named(source: SourceFlags) -> str | None:
    """The model that the command line names: PIXTRAL_MODEL_PATH is a default, and gives way to a model's own file."""
    return None if source.model_path == os.environ.get("PIXTRAL_MODEL_PATH") else source.model_path
