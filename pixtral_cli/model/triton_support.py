"""A device in, whether Triton's kernels run on it out. Knows no model.

Triton comes along with torch for CUDA, but may still fail: it needs a C compiler for its launcher, a folder for its
cache and a card that it knows. So one small kernel is tried. Files of kernels import triton at their top and are
imported only after `available` has said yes.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

logger = logging.getLogger("pixtral_cli.model")

_reasons: dict[int, str | None] = {}
"""By the card's number, as torch counts."""


def available(device: torch.device) -> bool:
    """Whether Triton compiles and runs a kernel on `device`: tried once, and a failure logged once as a warning.

    The first call for a device must not come while a CUDA graph is captured: it waits for the card.
    """
    if device.type != "cuda":
        return False
    card = torch.cuda.current_device() if device.index is None else device.index
    if card not in _reasons:
        _reasons[card] = reason = _try(device)
        if reason:
            logger.warning("Triton does not work here, so plain torch serves, more slowly: %s", reason)
    return _reasons[card] is None


def why_not() -> str | None:
    """The reason why Triton cannot be used on a card that was asked for; None where it works or none was asked for."""
    return next(filter(None, _reasons.values()), None)


@cache
def chains(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it has ended (programmatic dependent launch): Hopper and on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _try(device: torch.device) -> str | None:
    """None, or what went wrong in one line."""
    try:
        from pixtral_cli.model import triton_trial

        with torch.cuda.device(device):  # Triton launches on the current one
            found = triton_trial.counted(device).tolist()
    except Exception as error:  # noqa: BLE001  whatever fails in there, the model can do without
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None if found == [*range(1, len(found) + 1)] else f"it counted {found}"
