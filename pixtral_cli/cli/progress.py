"""Steps of a download or a load in, moving bars on standard error out. Only `console` imports it (it needs rich)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Bars = Callable[[str, int, int | None], None]
"""Called with a label, the bytes done, and the bytes in all (None when nobody knows)."""


@contextmanager
def bars(first_label: str, *, styled: bool) -> Iterator[Bars]:
    """One bar per label, gone when the block ends. `first_label` is shown until the first step."""
    label = TextColumn("{task.description}", markup=False)
    columns = (label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = _console(styled)
    waiting = console.status(first_label)
    shown = Progress(*columns, console=console, transient=True)
    tasks: dict[str, TaskID] = {}

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


def _console(styled: bool) -> Console:
    """Rich's own NO_COLOR leaves bold; without a colour system it writes neither."""
    return Console(stderr=True, color_system="auto" if styled else None)
