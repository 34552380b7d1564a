"""What is asked in, a whole run out: models made, programs started, rows as they come. Prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pixtral_cli.bench import ceilings, model_files, report
from pixtral_cli.bench.ceilings import Ceilings
from pixtral_cli.bench.counts import Counts
from pixtral_cli.bench.model_files import Subject
from pixtral_cli.bench.runs import OURS, Measured, Programs, Row, Sizes, rows
from pixtral_cli.devices import default, parse
from pixtral_cli.errors import PixtralError, RequestError
from pixtral_cli.model import slower_paths
from pixtral_cli.model.kernels import native


@dataclass
class Bench:
    """One run. `tell` takes sentences, `doing` what is being done, for whoever watches; `rows` are those so far."""

    sizes: Sizes
    device: torch.device
    compare: bool
    tell: Callable[[str], None]
    doing: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)
    header: dict[str, Any] = field(default_factory=dict)

    def run(self, model: str, make: Callable[[str | None, Path], Subject], encodings: Sequence[str | None]) -> None:
        """Measure the model in each encoding; `make(encoding, folder)` gives it."""
        self.doing("what this machine can do")
        found = ceilings.measure(self.device)
        threads = torch.get_num_threads()
        self.header = {
            "model": model,
            "machine": report.machine(),
            "device": str(self.device),
            "threads": threads,
            "torch": torch.__version__,
            "instructions": native.instructions(),
            "ceilings": report.ceilings_object(found),
            "programs": {},
        }
        for encoding in encodings:
            with TemporaryDirectory(prefix="pixtral-bench-") as folder:
                self.doing(f"{model}, {encoding or 'as it is'}")
                subject = make(encoding, Path(folder))
                for row in self._measured(subject, found, threads, Path(folder)):
                    self.rows.append(row)

    def _measured(self, subject: Subject, found: Ceilings, threads: int, folder: Path) -> Iterator[Row]:
        placement, config = subject.placement, subject.source.config
        if self.sizes.image and config.vision is None:
            raise RequestError(f"{subject.name} is a text model and cannot look at pictures.", "Leave --image out.")
        width = 4 if placement.dtype == "float32" else 2
        model = Measured(
            placement.label, Counts(config, subject.source.checkpoint.tensors, width), found, placement.dtype
        )
        models: dict[str, Any] = {OURS: {**subject.arguments, "devices": _name(self.device)}}
        for name, peer in model_files.PEERS.items() if self.compare else ():
            try:
                if peer.installed:
                    self.doing(f"{subject.name} for {name}")
                    models[name] = peer.prepare(subject, folder)
                else:
                    self.tell(f"{name} is left out: it is not installed (pip install {peer.packages}).")
            except PixtralError as error:
                self.tell(f"{name} is left out: {error}")
        programs = Programs(models, threads, self.sizes, self.tell)
        try:
            yield from rows(programs, model)
        finally:
            self.header["programs"] |= programs.abouts
            programs.end()

    def as_object(self) -> dict[str, Any]:
        return report.as_object(self.header, self.sizes, self.rows)

    def as_text(self) -> str:
        return report.as_text(self.as_object(), self.rows)


def device_of(text: str | None) -> torch.device:
    """What `--devices` means. Raises DeviceError."""
    gpus = torch.cuda.device_count()
    name = default(gpus) if text is None else parse(text).torch_name(gpus, slower_paths.sees_gpus())
    return torch.device(name)


def _name(device: torch.device) -> str:
    """As --devices takes it."""
    return "cpu" if device.type == "cpu" else f"gpu-{device.index or 0}"
