"""How progress is reported while bytes are downloaded, loaded, saved or checked. Knows no terminal and no network."""

from typing import Protocol


class Progress(Protocol):
    """Called repeatedly with what is being done, the bytes done, and the bytes in all (None if unknown)."""

    def __call__(self, label: str, done: int, total: int | None, /) -> None: ...


class DownloadProgress:
    """Sums the bytes of one file after the other, of `total` in all, and reports them."""

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
