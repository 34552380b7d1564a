"""What is asked in, a whole run out: models made, programs started, rows as they come. Prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pixtral_cli.bench import model_files, report
from pixtral_cli.bench.ceilings import Ceilings
from pixtral_cli.bench.contender import OURS
from pixtral_cli.bench.counts import Counts
from pixtral_cli.bench.model_files import Subject
from pixtral_cli.bench.runs import Measured, Programs, Row, Sizes
from pixtral_cli.devices import default, parse
from pixtral_cli.errors import PixtralError, RequestError
from pixtral_cli.model import slower_paths
from pixtral_cli.model.config import ModelConfig
from pixtral_cli.model.kernels import native
from weights_cache.errors import DiskFull

NO_ROOM = "Make room there, or let TMPDIR name a folder on another disk."


class Bench:
    """One run on one device; `rows` are those so far. `tell` takes sentences for the user, `doing` what is going on.

    Raises DeviceError for a device that is not there, as `--devices` names it.
    """

    def __init__(
        self,
        sizes: Sizes,
        devices: str | None,
        compare: bool,
        tell: Callable[[str], None],
        doing: Callable[[str], None],
    ) -> None:
        gpus = torch.cuda.device_count()
        name = default(gpus) if devices is None else parse(devices).torch_name(gpus, slower_paths.sees_gpus())
        self.device = torch.device(name)
        self.sizes, self.compare = sizes, compare
        self.tell, self.doing = tell, doing
        self.rows: list[Row] = []
        self.programs: dict[str, Any] = {}
        self.threads = torch.get_num_threads()

    def run(self, model: str, make: Callable[[str | None, Path], Subject], encodings: Sequence[str | None]) -> None:
        """Measure the model in each encoding; `make(encoding, folder)` gives it."""
        self.doing("measuring this machine")
        self.model, self.ceilings = model, Ceilings(self.device)
        self.ceilings.sample()
        for encoding in encodings:
            with TemporaryDirectory(prefix="pixtral-bench-") as folder:
                self.doing(f"preparing {model}{f' in {encoding}' if encoding else ''}")
                try:
                    subject = make(encoding, Path(folder))
                except DiskFull as error:
                    error.advice = error.advice or NO_ROOM
                    raise
                for row in self._rows(subject, Path(folder)):
                    self.rows.append(row)

    def _rows(self, subject: Subject, folder: Path) -> Iterator[Row]:
        placement, config = subject.placement, subject.source.config
        self._check(subject.name, config)
        counts = Counts(config, subject.source.checkpoint.tensors, 4 if placement.dtype == "float32" else 2)
        models = {OURS: {**subject.arguments, "devices": self._device_name}, **dict(self._for_peers(subject, folder))}
        programs = Programs(models, self.threads, self.sizes, self.ceilings, self.tell, self.doing)
        try:
            yield from Measured(placement.label, counts, placement.dtype).rows(programs, self.programs)
        finally:
            programs.end()

    def _check(self, name: str, config: ModelConfig) -> None:
        """Raise RequestError for what the model cannot be measured with, before it is loaded."""
        if self.sizes.context > config.text.max_length:
            raise RequestError(
                f"{name} has a context of {config.text.max_length} tokens, and this takes {self.sizes.context}.",
                "Lower --prompt-tokens or --new-tokens.",
            )
        if self.sizes.image is None:
            return
        if config.vision is None or config.image_layout is None:
            raise RequestError(f"{name} is a text model and cannot look at pictures.", "Leave --image out.")
        side, most = config.image_layout.token_size, config.image_layout.longest_side
        if config.image_layout.cropped and self.sizes.image != (most, most):
            raise RequestError(f"{name} sees pictures of {most}x{most} pixels.", f"Write --image {most}x{most}.")
        if any(pixels % side or pixels > most for pixels in self.sizes.image):
            raise RequestError(
                f"{name} computes pictures whose sides are multiples of {side} pixels, up to {most}; others are "
                "resized to that before.",
                f"Write such sides, as in --image {most}x{most}.",
            )

    def _for_peers(self, subject: Subject, folder: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
        """Each peer that is installed and can have the model, and the model as it reads it."""
        for name, peer in model_files.PEERS.items() if self.compare else ():
            if peer.encoding not in (None, subject.placement.label):
                continue
            if not peer.installed:
                self.tell(f"{name} is left out: it is not installed (pip install {peer.packages}).")
                continue
            self.doing(f"preparing {subject.name} for {name}")
            try:
                yield name, {**peer.prepare(subject, folder), "device": str(self.device)}
            except PixtralError as error:
                self.tell(f"{name} is left out: {error}")

    @property
    def _device_name(self) -> str:
        """As --devices takes it."""
        return "cpu" if self.device.type == "cpu" else f"gpu-{self.device.index or 0}"

    def as_object(self) -> dict[str, Any]:
        """What was measured until now."""
        header = {
            "model": self.model,
            "machine": report.machine(),
            "device": self._device_name,
            "threads": self.threads,
            "torch": torch.__version__,
            "instructions": native.instructions(),
            "programs": self.programs,
            "ceilings": report.ceilings_object(self.ceilings.samples),
        }
        return report.as_object(header, self.sizes, self.rows)

    def as_text(self) -> str:
        return report.as_text(self.as_object(), self.rows)
