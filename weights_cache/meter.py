"""Bytes as they arrive in, a progress report out; dressed as the progress bar that the Hub's library wants."""

import inspect
from collections.abc import Callable
from typing import Any, Self

Progress = Callable[[str, int, int | None], None]
"""Called with (label, bytes done, bytes total or None); done and total run over all files that are fetched."""


def counting(function: Callable[..., Any], meter: "Meter") -> dict[str, Any]:
    """The argument with which a function of the library counts into `meter`; none in versions that lack it."""
    known = "tqdm_class" in inspect.signature(function).parameters
    return {"tqdm_class": meter.bar_class()} if known else {}


class Meter:
    """Sums the bytes of one file after the other and reports them."""

    def __init__(self, label: str, total: int | None, report: Progress | None):
        self.label, self.total, self.report = label, total, report
        self.finished = 0
        self.current = 0

    def add(self, nbytes: float) -> None:
        self.current += int(nbytes)
        self._tell()

    def finish_file(self, size: int | None) -> None:
        """The file has arrived: what it counted is replaced by its true size."""
        self.finished += self.current if size is None else size
        self.current = 0
        self._tell()

    def checking(self, done: int, size: int) -> None:
        """Tell how much of a file that has arrived was checked."""
        if self.report:
            self.report(f"checking {self.label}", done, size)

    def _tell(self) -> None:
        if self.report:
            self.report(self.label, self.finished + self.current, self.total)

    def bar_class(self) -> type:
        """A class that the library takes for a progress bar: it draws nothing and counts into this meter."""
        meter = self

        class Bar:
            n = 0

            def __init__(self, *args: Any, total: int | None = None, initial: int = 0, **options: Any):
                self.total = total
                meter.add(initial)

            def update(self, nbytes: float | None = 1) -> None:
                meter.add(nbytes or 0)

            def update_transfer(self, nbytes: float | None = 1) -> None:
                """Bytes on the wire, which differ from bytes of the file when chunks are shared: not shown."""

            def quiet(self, *args: Any, **options: Any) -> None:
                """Whatever else a bar can do."""

            close = refresh = reset = set_description = set_description_str = quiet
            set_postfix = set_postfix_str = set_transfer_postfix_str = quiet

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *exception: object) -> None:
                pass

        return Bar
