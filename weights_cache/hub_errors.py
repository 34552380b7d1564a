"""Errors of the Hub's library (huggingface_hub >= 1.0) become ours, each with what to do about it."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import cache
from .errors import DownloadFailed, Gated, ModelNotFound, Offline, TokenUnusable, Unreadable, WeightsError
from .repo_name import Repo, endpoint

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@contextmanager
def translated(repo: Repo) -> Iterator[None]:
    """Inside, the library's errors about `repo` become ours, and its warnings (of each retry, say) are not printed."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        ours = _ours(repo, list(_causes(error)))
        if ours is None:
            raise
        raise ours from error
    finally:
        logger.setLevel(level)


def check_token() -> None:
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


def _ours(repo: Repo, chain: list[BaseException]) -> WeightsError | None:
    """Our error for the `chain` of the library's, or None for what is no failure of the network."""
    from huggingface_hub import errors as theirs

    label = str(repo)
    for cause in chain:
        if isinstance(cause, theirs.GatedRepoError):
            return Gated(label, repo.page, _status(cause))
        if isinstance(cause, theirs.RepositoryNotFoundError):
            advice = "Check the spelling; if the model is private, set HF_TOKEN to a token that may read it."
            return ModelNotFound(label, f"no folder here has that name, and {endpoint()} has no such model", advice)
        if isinstance(cause, theirs.RevisionNotFoundError):
            advice = f"The part after @ must be a branch, tag or commit of {repo.page}."
            return ModelNotFound(label, f"the repository has no revision {repo.revision!r}", advice)
        if isinstance(cause, theirs.OfflineModeIsEnabled):
            return Offline(label, cache.hub_cache_folder())
        if isinstance(cause, theirs.HfHubHTTPError):
            return _refused(repo, cause)
    return _broken(label, chain)


def _refused(repo: Repo, error: BaseException) -> WeightsError:
    """The server answered, with a status that says no."""
    from huggingface_hub import get_token

    label, status = str(repo), _status(error)
    if status == 403:
        return Gated(label, repo.page, status)
    if status == 429:
        return DownloadFailed(label, f"{endpoint()} asks to slow down (429)", "Wait, then run it again.")
    if status != 401:
        return DownloadFailed(label, f"{endpoint()} answered {status}")
    if get_token():
        return DownloadFailed(label, "the Hub does not accept the token", "Correct or unset HF_TOKEN.")
    advice = "Set HF_TOKEN to a token that may read it, or run `hf auth login`."
    return DownloadFailed(label, f"{endpoint()} asks for a token, and there is none", advice)


def _broken(label: str, chain: list[BaseException]) -> DownloadFailed | None:
    """No answer came, or this machine's disk refused it; None if the error is of neither kind."""
    for cause in chain:
        if isinstance(cause, OSError) and (cause.filename or cause.errno in NO_ROOM):
            return _unwritable(label, cause)
    network = [c for c in chain if isinstance(c, OSError) or type(c).__module__.startswith(("httpx", "httpcore"))]
    if not network:
        return None
    kinds = " ".join(type(cause).__name__ for cause in network)
    text = " ".join(str(network[-1]).split())[:200]
    if "Timeout" in kinds:
        return DownloadFailed(label, f"{endpoint()} did not answer in time")
    if "ConnectError" in kinds or "ConnectionRefused" in kinds:
        return DownloadFailed(label, f"{endpoint()} cannot be reached ({text})")
    return DownloadFailed(label, f"the connection to {endpoint()} broke ({text})")


def _unwritable(label: str, error: OSError) -> DownloadFailed:
    folder, variable = cache.hub_cache_folder(), "HF_HUB_CACHE"
    if Path(str(error.filename)).is_relative_to(cache.own_cache_folder()):
        folder, variable = cache.own_cache_folder(), "PIXTRAL_CACHE"
    advice = f"Make room there, or set {variable} to a folder that can be written."
    return DownloadFailed(label, f"{folder} cannot be written ({error.strerror})", advice)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
