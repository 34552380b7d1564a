"""A large file of a repository in, its checked content in the Hub's cache out; goes on where an earlier run broke off.

The Hub's library removes what has arrived of a file when a run ends; a weights file of 5 GB that broke off at the end
would begin again. Here the part stays beside the cache's contents, and the next run asks for the rest (a Range
request, sent by the library with its mirrors, tokens, proxies and retries). The lock only saves bandwidth: whoever
writes, a file gets its name only after its SHA-256 was found to be that of the Hub.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import store
from .errors import DownloadFailed
from .meter import Meter, counting

MOST_BYTES = 50 * 10**9
"""The Hub serves larger files by another protocol only, which its library speaks (hf_xet)."""

REPORTED = 2**26  # bytes; checking a smaller file takes no time worth a word
CHUNK = 2**22


def get(transfer: Any, name: str, sha256: str, size: int, meter: Meter, *, force: bool) -> Path:
    """The content of `name` in the cache; what is there already is used, unless `force`.

    Raises DownloadFailed for content of another length or hash, and the library's errors. What has arrived is kept.
    """
    from huggingface_hub.utils import WeakFileLock

    target, partial = store.blob(transfer.repo, sha256), store.partial_blob(transfer.repo, sha256)
    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(_lock(transfer.repo, sha256)):
        if force or not (target.is_file() and target.stat().st_size == size):
            resumed = partial.is_file()
            _append(transfer, name, partial, size, meter)
            if not _is_genuine(partial, sha256, size, meter):
                partial.unlink()
                if not resumed:
                    raise altered(transfer.label, name)
                _append(transfer, name, partial, size, meter)  # what was there was wrong: all of it anew
                if not _is_genuine(partial, sha256, size, meter):
                    partial.unlink()
                    raise altered(transfer.label, name)
            partial.replace(target)
    return target


def arrived(repo: str, sha256: str) -> int:
    """Bytes of the content that an earlier run left."""
    partial = store.partial_blob(repo, sha256)
    return partial.stat().st_size if partial.is_file() else 0


def is_genuine(path: Path, *, sha256: str | None, sha1: str | None) -> bool:
    """Whether the file is what the Hub says it is; True where the Hub says nothing. `sha1` is git's, of a blob."""
    if sha256:
        return _hash(path, hashlib.sha256()) == sha256
    return not sha1 or _hash(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)) == sha1


def altered(label: str, name: str) -> DownloadFailed:
    """The error for content that is not what the Hub says it is."""
    advice = "It was removed. Run it again; if that does not help, what stands between here and the Hub alters files."
    return DownloadFailed(label, f"{name} arrived altered (its hash is not the one that the Hub gives)", advice)


def _append(transfer: Any, name: str, partial: Path, size: int, meter: Meter) -> None:
    """Fetch what `partial` still lacks. Raises DownloadFailed when that is no longer the file of the listing."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import HfHubHTTPError, build_hf_headers

    if partial.is_file() and partial.stat().st_size > size:
        partial.unlink()
    url = hf_hub_url(transfer.repo, name, revision=transfer.commit, endpoint=transfer.endpoint)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    with partial.open("ab") as file:
        here = file.tell()
        try:
            http_get(url, file, resume_size=here, headers=headers, expected_size=size, **counting(http_get, meter))
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 416:
                raise
            raise _other_length(transfer.label, name, partial) from error
        except OSError as error:  # the library's word for a whole answer of another length has no number
            if type(error) is not OSError or error.errno is not None:
                raise
            raise _other_length(transfer.label, name, partial) from error
        finally:
            file.flush()
            os.fsync(file.fileno())


def _other_length(label: str, name: str, partial: Path) -> DownloadFailed:
    partial.unlink(missing_ok=True)
    return DownloadFailed(label, f"{name} has another length than the Hub's listing says")


def _is_genuine(partial: Path, sha256: str, size: int, meter: Meter) -> bool:
    report = meter.checking if size >= REPORTED else None
    return partial.stat().st_size == size and _hash(partial, hashlib.sha256(), report) == sha256


def _hash(path: Path, digest: Any, report: Callable[[int, int], None] | None = None) -> str:
    done, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if report is not None:
                report(done, size)
    return digest.hexdigest()


def _lock(repo: str, sha256: str) -> Path:
    """Beside the locks of the Hub's library."""
    path = store.cache_folder() / ".locks" / store.repo_folder(repo).name / f"{sha256}.pixtral.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
