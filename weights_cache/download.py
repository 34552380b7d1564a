"""Names of files of one repository in, the files in the Hub's cache out, each checked against its hash.

The only module that asks the network, by huggingface_hub (mirrors, tokens, proxies, retries), which it imports when
the first request is due. The library removes what has arrived of a file when a run ends; a weights file of 5 GB that
broke off at the end would begin again. Here the part stays beside the cache's contents, and the next run asks for the
rest (a Range request). The lock only saves bandwidth: whoever writes, a file gets its name only after its SHA-256 was
found to be that of the Hub.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Self

from . import cache, hub_errors, layout, repo_name
from .cache import CachedRepo, replacing
from .errors import CheckpointCorrupt, DownloadFailed
from .file_kind import MAX_HEADER_BYTES
from .formats.gguf import Header
from .formats.safetensors import LENGTH_BYTES
from .progress import DownloadProgress, Progress
from .repo_name import Repo

LISTING_TIMEOUT = 30.0  # seconds
SHA256 = re.compile(r"[0-9a-f]{64}")
MOST_BYTES = 50 * 10**9
"""The Hub serves larger files by another protocol only, which its library speaks (hf_xet)."""

REPORTED = 2**26  # bytes; checking a smaller file takes no time worth a word
HEADER_BYTES = {layout.SAFETENSORS: 2**18, layout.GGUF: 2**23}
"""Bytes to ask for first: the headers of nearly all files (a GGUF has its tokenizer there)."""

MOST_HEADER_BYTES = MAX_HEADER_BYTES + LENGTH_BYTES


@dataclass(frozen=True, slots=True)
class Content:
    """What the Hub says of a file: `sha256` of those in its large storage, git's own hash (`sha1`) of the others."""

    size: int | None
    sha256: str | None = None
    sha1: str | None = None


class Download:
    """What is fetched of `repo`. Its listing is asked for at once: `commit`, and the `contents` by file names.

    Raises DownloadFailed for what is no listing.
    """

    def __init__(self, repo: Repo, progress: Progress | None = None):
        self.repo, self.label = repo, str(repo)
        self.cached = CachedRepo(repo.name)
        self.endpoint = repo_name.endpoint()
        self._progress = progress
        self.commit, self.contents = self._listing()
        if outside := [name for name, content in self.contents.items() if not _stays_inside(name, content)]:
            reason = f"{self.endpoint} lists {outside[0][:200]!r}, which is no place for a file"
            raise DownloadFailed(self.label, reason)

    @property
    def sizes(self) -> dict[str, int | None]:
        return {name: content.size for name, content in self.contents.items()}

    @property
    def folder(self) -> Path:
        """The snapshot."""
        return self.cached.snapshot(self.commit)

    def _listing(self) -> tuple[str, dict[str, Content]]:
        """One request: the commit that the revision is, and what files it has."""
        from huggingface_hub import HfApi

        hub_errors.check_token()
        with hub_errors.translated(self.repo):
            api = HfApi(endpoint=self.endpoint)
            revision = self.repo.revision
            info = api.model_info(self.repo.name, revision=revision, files_metadata=True, timeout=LISTING_TIMEOUT)
        commit = info.sha or ""
        if not cache.COMMIT.fullmatch(commit):
            raise DownloadFailed(self.label, f"{self.endpoint} did not say which commit {revision!r} is")
        return commit, {
            file.rfilename: Content(file.size, sha256=file.lfs.sha256)
            if file.lfs
            else Content(file.size, sha1=file.blob_id)
            for file in info.siblings or ()
        }

    def has(self, name: str) -> bool:
        """Whether the snapshot holds the file in full, as far as its length and header tell."""
        path = self.folder / name
        return cache.is_whole(path) and cache.has_size(path, self.contents[name].size)

    def remaining(self, name: str) -> int:
        """Bytes of the file that are still to come, 0 if nobody knows."""
        content = self.contents[name]
        partial = self.cached.partial_blob(content.sha256) if content.sha256 else None
        here = partial.stat().st_size if partial and partial.is_file() else 0
        return max((content.size or 0) - here, 0)

    def progress(self, names: Iterable[str]) -> DownloadProgress:
        """What reports the bytes of `names` as they arrive."""
        sizes = [self.contents[name].size for name in names]
        return DownloadProgress(self.label, None if None in sizes else sum(size or 0 for size in sizes), self._progress)

    def get(self, names: Iterable[str], progress: DownloadProgress | None = None, *, force: bool = False) -> None:
        """Fetch `names` one after the other, in this order.

        What the snapshot has already is fetched anew; what the cache has from another revision is linked, unless
        `force`. Raises DownloadFailed, also for content that was altered on the way or has a wrong length.
        """
        progress = progress or DownloadProgress(self.label, None, None)
        for name in names:
            with hub_errors.translated(self.repo):
                self._get(name, progress, force or (self.folder / name).exists())  # it is there: it is damaged
            if not cache.is_whole(self.folder / name):
                raise DownloadFailed(self.label, f"{name} arrived with another length than its header says")
            progress.finish_file(self.contents[name].size)

    def get_headers(self, names: Iterable[str], folder: Path) -> None:
        """Write into `folder`, for each of the weights files `names`, a file of its length with its header only.

        Readers map a file and touch only what they are asked for, so that it serves them for names, shapes and
        encodings; the rest is a hole, which takes no room on a disk.
        """
        for name in names:
            with hub_errors.translated(self.repo), replacing(folder / name) as temporary:
                self._get_header(name, temporary)

    def _get(self, name: str, progress: DownloadProgress, force: bool) -> None:
        content, path = self.contents[name], self.folder / name
        if content.sha256 and content.size and content.size <= MOST_BYTES:
            cache.link(self._get_large(name, content.sha256, content.size, progress, force), path)
            return
        self._get_small(name, progress, force)
        if not cache.has_hash(path, sha256=content.sha256, sha1=content.sha1):
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise self._altered(name)

    def _get_small(self, name: str, progress: DownloadProgress, force: bool) -> None:
        from huggingface_hub import hf_hub_download

        hf_hub_download(
            self.repo.name,
            name,
            revision=self.commit,
            endpoint=self.endpoint,
            cache_dir=cache.hub_cache_folder(),
            force_download=force,
            **_counting(hf_hub_download, progress),
        )

    def _get_large(self, name: str, sha256: str, size: int, progress: DownloadProgress, force: bool) -> Path:
        """The content in the cache; what is there already is used, unless `force`. What has arrived is kept."""
        from huggingface_hub.utils import WeakFileLock

        target, partial, lock = self.cached.blob(sha256), self.cached.partial_blob(sha256), self.cached.lock(sha256)
        for folder in (target.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not force and target.is_file() and cache.has_size(target, size):
                return target
            for _ in range(2 if partial.is_file() else 1):  # what was there may be wrong: then all of it anew
                self._append(name, partial, size, progress)
                report = progress.checking if size >= REPORTED else None
                if cache.has_size(partial, size) and cache.has_hash(partial, sha256=sha256, report=report):
                    partial.replace(target)
                    return target
                partial.unlink()
        raise self._altered(name)

    def _append(self, name: str, partial: Path, size: int, progress: DownloadProgress) -> None:
        """Fetch what `partial` still lacks. Raises DownloadFailed when that is no longer the file of the listing."""
        from huggingface_hub.file_download import http_get

        if partial.is_file() and partial.stat().st_size > size:
            partial.unlink()
        url, headers = self._request(name)
        counted = _counting(http_get, progress)
        with partial.open("ab") as file:
            try:
                http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=size, **counted)
            except OSError as error:  # as the library's own errors are
                if not _is_of_another_length(error):
                    raise
                partial.unlink(missing_ok=True)
                reason = f"{name} has another length than the Hub's listing says"
                raise DownloadFailed(self.label, reason) from error
            finally:
                file.flush()
                os.fsync(file.fileno())

    def _get_header(self, name: str, path: Path) -> None:
        """Write the header of the weights file `name` to `path`, which becomes as long as the file."""
        size = self.contents[name].size
        if size is None:
            raise DownloadFailed(self.label, f"the Hub does not say how long {name} is")
        have, wanted = 0, min(HEADER_BYTES.get(Path(name).suffix, LENGTH_BYTES), size)
        with path.open("wb") as file:
            os.truncate(file.fileno(), size)
            while have < wanted:
                data = self._range(name, have, wanted)
                if len(data) < wanted - have:
                    raise DownloadFailed(self.label, f"{name} is shorter than the Hub's listing says")
                file.write(data)
                file.flush()
                have, wanted = wanted, min(_header_bytes(name, path, wanted), size, MOST_HEADER_BYTES)

    def _range(self, name: str, begin: int, end: int) -> bytes:
        """The bytes [begin, end) of the file; a server that knows no ranges is left once they have come."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        url, headers = self._request(name)
        headers["Range"] = f"bytes={begin}-{end - 1}"
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            skipped = begin if response.status_code == 200 else 0
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= skipped + end - begin:
                    break
        return bytes(data[skipped : skipped + end - begin])

    def _request(self, name: str) -> tuple[str, dict[str, str]]:
        """The file's address, and the headers with which it is asked for."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repo.name, name, revision=self.commit, endpoint=self.endpoint)
        return url, build_hf_headers() | {"Accept-Encoding": "identity"}

    def _altered(self, name: str) -> DownloadFailed:
        """The error for content that is not what the Hub says it is."""
        advice = (
            "It was removed. Run it again; if that does not help, what stands between here and the Hub alters files."
        )
        reason = f"{name} arrived altered (its hash is not the one that the Hub gives)"
        return DownloadFailed(self.label, reason, advice)


def _stays_inside(name: str, content: Content) -> bool:
    """Whether name and hash, which become paths here, lead nowhere else than into the repository's folder."""
    path = PurePath(name)
    inside = path.parts and not path.anchor and ".." not in path.parts
    return bool(inside and (content.sha256 is None or SHA256.fullmatch(content.sha256)))


def _is_of_another_length(error: Exception) -> bool:
    """Whether the server has nothing where the rest should begin (416), or its whole answer is of another length, for
    which the library's word is an OSError without a number."""
    if type(error) is OSError:
        return error.errno is None
    return getattr(getattr(error, "response", None), "status_code", None) == 416


def _header_bytes(name: str, path: Path, have: int) -> int:
    """How many bytes the header takes, by what is known from `have` of them; twice as many while nobody knows."""
    if name.endswith(layout.SAFETENSORS):
        with path.open("rb") as file:
            return LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
    try:
        Header(path)
    except CheckpointCorrupt:
        return 2 * have
    return have


def _counting(function: Callable[..., Any], progress: DownloadProgress) -> dict[str, Any]:
    """The argument with which a function of the library counts into `progress`; none in versions that lack it."""
    known = "tqdm_class" in inspect.signature(function).parameters
    return {"tqdm_class": _bar_class(progress)} if known else {}


def _bar_class(progress: DownloadProgress) -> type:
    """A class that the library takes for a tqdm: it draws nothing and counts into `progress`."""

    class Bar:
        n = 0

        def __init__(self, *args: Any, total: int | None = None, initial: int = 0, **options: Any):
            self.total = total
            progress.add(initial)

        def update(self, nbytes: float | None = 1) -> None:
            progress.add(nbytes or 0)

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
