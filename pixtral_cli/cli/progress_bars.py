"""Steps of a download or a load in, moving bars on standard error out. Only `console` imports it (it needs rich)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console

from weights_cache.progress import Progress


@contextmanager
def bars(first_label: str, *, styled: bool) -> Iterator[Progress]:
    """One bar per label, gone when the block ends. `first_label` is shown until the first step."""
    console = _console(styled)
    waiting = console.status(first_label)
    shown = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    tasks: dict[str, progress.TaskID] = {}

    def step(label: str, done: int, total: int | None) -> None:
        if not tasks:
            waiting.stop()
            shown.start()
        if label not in tasks:
            tasks[label] = shown.add_task(label, total=total)
        shown.update(tasks[label], completed=done, total=total)

    waiting.start()
    try:
        yield step
    finally:
        waiting.stop()
        shown.stop()


@contextmanager
def status(label: str, *, styled: bool) -> Iterator[Callable[[], None]]:
    """A moving sign beside `label`, until the block ends or calls the value."""
    shown = _console(styled).status(label)
    shown.start()
    try:
        yield shown.stop
    finally:
        shown.stop()


@contextmanager
def changing(label: str, *, styled: bool) -> Iterator[Callable[[str], None]]:
    """A moving sign beside a label, which calling the value changes."""
    with _console(styled).status(label) as shown:
        yield shown.update


def _console(styled: bool) -> Console:
    """Rich's own NO_COLOR leaves bold; without a colour system it writes neither."""
    return Console(stderr=True, color_system="auto" if styled else None)
