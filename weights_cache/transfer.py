"""Names of files of one repository in, the files in the Hub's cache out, and the library's errors as ours.

The only module that imports huggingface_hub (>= 1.0), and it does so when the first request is due.
"""

import errno
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath

from . import headers, large_file, own_cache, repo_name, store
from .errors import DownloadFailed, Gated, ModelNotFound, Offline, TokenUnusable, Unreadable, WeightsError
from .meter import Meter, Progress, counting

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
LISTING_TIMEOUT = 30.0  # seconds
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Content:
    """What the Hub says of a file: `sha256` of those in its large storage, git's own hash (`sha1`) of the others."""

    size: int | None
    sha256: str | None = None
    sha1: str | None = None


class Transfer:
    """What is fetched from `repo` at `revision`. After `listing()`, `commit` and `sizes` (bytes or None) are known."""

    def __init__(self, repo: str, revision: str, *, label: str, report: Progress | None):
        self.repo, self.revision, self.label = repo, revision, label
        self.endpoint = repo_name.endpoint()
        self.commit = ""
        self.contents: dict[str, Content] = {}
        self._report = report

    @property
    def sizes(self) -> dict[str, int | None]:
        return {name: content.size for name, content in self.contents.items()}

    def listing(self) -> dict[str, int | None]:
        """One request: the repository's file names -> sizes in bytes. Raises DownloadFailed for what is no listing."""
        from huggingface_hub import HfApi

        _check_token()
        with self.our_errors():
            api = HfApi(endpoint=self.endpoint)
            info = api.model_info(self.repo, revision=self.revision, files_metadata=True, timeout=LISTING_TIMEOUT)
        if not store.COMMIT.fullmatch(info.sha or ""):
            raise DownloadFailed(self.label, f"{self.endpoint} did not say which commit {self.revision!r} is")
        self.commit = info.sha
        self.contents = {
            file.rfilename: Content(file.size, file.lfs and file.lfs.sha256, None if file.lfs else file.blob_id)
            for file in info.siblings or ()
        }
        if outside := [name for name, content in self.contents.items() if not _stays_inside(name, content)]:
            reason = f"{self.endpoint} lists {outside[0][:200]!r}, which is no place for a file"
            raise DownloadFailed(self.label, reason)
        return self.sizes

    def has(self, name: str) -> bool:
        """Whether the snapshot holds the file in full, as far as its length and header tell."""
        path, size = self._path(name), self.contents[name].size
        return store.is_whole(path) and (size is None or path.stat().st_size == size)

    def remaining(self, name: str) -> int:
        """Bytes of the file that are still to come, 0 if nobody knows."""
        content = self.contents[name]
        here = large_file.arrived(self.repo, content.sha256) if content.sha256 else 0
        return max((content.size or 0) - here, 0)

    def meter(self, names: Iterable[str]) -> Meter:
        """What reports the bytes of `names` as they arrive."""
        sizes = [self.sizes.get(name) for name in names]
        return Meter(self.label, None if None in sizes else sum(sizes), self._report)

    def get(self, names: Iterable[str], meter: Meter | None = None, *, force: bool = False) -> None:
        """Fetches `names` one after the other, in this order, and counts into `meter`. What the snapshot has already is
        fetched anew; what the cache has from another revision is linked, unless `force`."""
        meter = meter or Meter(self.label, None, None)
        for name in names:
            with self.our_errors():
                self._get_one(name, meter, force)
            meter.finish_file(self.sizes.get(name))

    def get_headers(self, names: Iterable[str], folder: Path) -> None:
        """Writes into `folder`, for each of the weights files `names`, a file of its length with its header only."""
        for name in names:
            with self.our_errors():
                headers.write(self, name, folder / name)

    def _get_one(self, name: str, meter: Meter, force: bool) -> None:
        """Fetch a file and check its hash. A file that is in the snapshot already is there because it is damaged."""
        content, path = self.contents[name], self._path(name)
        anew = force or path.exists()
        if content.sha256 and content.size and content.size <= large_file.MOST_BYTES:
            source = large_file.get(self, name, content.sha256, content.size, meter, force=anew)
            store.link(source, path)
            return
        self._get_small(name, meter, anew)
        if not large_file.is_genuine(path, sha256=content.sha256, sha1=content.sha1):
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise large_file.altered(self.label, name)

    def _get_small(self, name: str, meter: Meter, force: bool) -> None:
        from huggingface_hub import hf_hub_download

        hf_hub_download(
            self.repo,
            name,
            revision=self.commit,
            endpoint=self.endpoint,
            cache_dir=store.cache_folder(),
            force_download=force,
            **counting(hf_hub_download, meter),
        )

    def _path(self, name: str) -> Path:
        return store.snapshot(self.repo, self.commit) / name

    @contextmanager
    def our_errors(self) -> Iterator[None]:
        """Inside, the library's errors become ours, and its warnings (of each retry, say) are not printed."""
        logger = logging.getLogger("huggingface_hub")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        except WeightsError:
            raise
        except Exception as error:
            ours = self._translated(error)
            if ours is None:
                raise
            raise ours from error
        finally:
            logger.setLevel(level)

    def _translated(self, error: Exception) -> WeightsError | None:
        """Our error for one of the library's, or None for what is no failure of the network."""
        from huggingface_hub import errors as theirs

        chain = list(_causes(error))
        for cause in chain:
            if isinstance(cause, theirs.GatedRepoError):
                return self._gated(cause)
            if isinstance(cause, theirs.RepositoryNotFoundError):
                return self._unknown_repository()
            if isinstance(cause, theirs.RevisionNotFoundError):
                advice = f"The part after @ must be a branch, tag or commit of {self.endpoint}/{self.repo}."
                return ModelNotFound(self.label, f"the repository has no revision {self.revision!r}", advice)
            if isinstance(cause, theirs.OfflineModeIsEnabled):
                return Offline(self.label, store.cache_folder())
            if isinstance(cause, theirs.HfHubHTTPError):
                return self._refused(cause)
        return self._broken(chain)

    def _gated(self, error: Exception) -> Gated:
        return Gated(self.label, f"{self.endpoint}/{self.repo}", _status(error))

    def _unknown_repository(self) -> ModelNotFound:
        advice = "Check the spelling; if the model is private, set HF_TOKEN to a token that may read it."
        return ModelNotFound(self.label, f"no folder here has that name, and {self.endpoint} has no such model", advice)

    def _refused(self, error: Exception) -> WeightsError:
        """The server answered, with a status that says no."""
        status = _status(error)
        if status == 401:
            return self._unauthorised()
        if status == 403:
            return self._gated(error)
        if status == 429:
            return DownloadFailed(self.label, f"{self.endpoint} asks to slow down (429)", "Wait, then run it again.")
        return DownloadFailed(self.label, f"{self.endpoint} answered {status}")

    def _unauthorised(self) -> DownloadFailed:
        from huggingface_hub import get_token

        if get_token():
            return DownloadFailed(self.label, "the Hub does not accept the token", "Correct or unset HF_TOKEN.")
        advice = "Set HF_TOKEN to a token that may read it, or run `hf auth login`."
        return DownloadFailed(self.label, f"{self.endpoint} asks for a token, and there is none", advice)

    def _broken(self, chain: list[BaseException]) -> DownloadFailed | None:
        """No answer came, or this machine's disk refused it; None if the error is of neither kind."""
        for cause in chain:
            if isinstance(cause, OSError) and (cause.filename or cause.errno in NO_ROOM):
                return self._unwritable(cause)
        network = [c for c in chain if isinstance(c, OSError) or type(c).__module__.startswith(("httpx", "httpcore"))]
        if not network:
            return None
        kinds = " ".join(type(cause).__name__ for cause in network)
        text = " ".join(str(network[-1]).split())[:200]
        if "Timeout" in kinds:
            return DownloadFailed(self.label, f"{self.endpoint} did not answer in time")
        if "ConnectError" in kinds or "ConnectionRefused" in kinds:
            return DownloadFailed(self.label, f"{self.endpoint} cannot be reached ({text})")
        return DownloadFailed(self.label, f"the connection to {self.endpoint} broke ({text})")

    def _unwritable(self, error: OSError) -> DownloadFailed:
        folder, variable = store.cache_folder(), "HF_HUB_CACHE"
        if Path(str(error.filename)).is_relative_to(own_cache.own_cache_folder()):
            folder, variable = own_cache.own_cache_folder(), "PIXTRAL_CACHE"
        advice = f"Make room there, or set {variable} to a folder that can be written."
        return DownloadFailed(self.label, f"{folder} cannot be written ({error.strerror})", advice)


def _check_token() -> None:
    """Raise TokenUnusable if a request with the user's token could not be written, Unreadable if its file is not."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    try:
        value = build_hf_headers().get("authorization", "")
    except UnicodeDecodeError:  # of the file
        value = "\0"
    except OSError as error:  # of the file
        raise Unreadable(Path(constants.HF_TOKEN_PATH), error.strerror or str(error)) from error
    if not (value.isascii() and value.isprintable()):
        named = next((variable for variable in TOKEN_VARIABLES if os.environ.get(variable)), None)
        raise TokenUnusable(named or constants.HF_TOKEN_PATH)


def _stays_inside(name: str, content: Content) -> bool:
    """Whether name and hash, which become paths here, lead nowhere else than into the repository's folder."""
    path = PurePath(name)
    inside = path.parts and not path.anchor and ".." not in path.parts
    return bool(inside and (content.sha256 is None or SHA256.fullmatch(content.sha256)))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
