"""A device in, which kernels run on it out, and sentences on what is slower there than it could be. Knows no model.

On a CPU the fast path is our library in C. The fast paths of a card need Triton and NVRTC, which torch for CUDA brings
along. Where one is missing or fails, plain torch serves, with the same results.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from pixtral_cli.devices import INSTALL_CUDA, NO_CUDA
from pixtral_cli.model import card_bits, native_library, triton_support
from pixtral_cli.model.kernels import cuda_packed, native
from weights_cache.encodings import ENCODINGS


def sees_gpus() -> bool:
    """Whether torch is built for GPUs at all."""
    return torch.version.cuda is not None or torch.version.hip is not None


def kernels(device: torch.device) -> str:
    """Which kernels multiply on `device`, in a few words: "avx512bf16 (2 threads)", "CUDA and Triton"."""
    if device.type != "cuda":
        return native_library.words(native.threads())
    return "CUDA and Triton" if triton_support.available(device) else "torch's"


def notes(device: torch.device, encodings: Collection[str] = ()) -> list[str]:
    """A sentence for each path that weights in `encodings` would take and cannot on `device`."""
    if device.type != "cuda":
        return native_library.notes() if any(ENCODINGS[encoding].packed for encoding in encodings) else []
    found = []
    if not triton_support.available(device):
        found.append(
            f"Triton does not work here, so plain torch serves, more slowly: {_first_line(triton_support.why_not())}."
        )
    packed = [encoding for encoding in card_bits.UNIT_BYTES if encoding in encodings]
    if why := next(filter(None, (cuda_packed.why_not(encoding, device) for encoding in packed)), None):
        found.append(
            f"The kernels for packed weights do not work here, so {', '.join(packed)} is slow: {_first_line(why)}."
        )
    return found


def _first_line(reason: str | None) -> str:
    return (reason or "nobody says why").strip().splitlines()[0].rstrip(".")


def notes_of_this_machine() -> list[str]:
    """The same for all GPUs that torch sees, each sentence once; or that it cannot see any."""
    if not sees_gpus():
        return [f"{NO_CUDA} Install one for CUDA: {INSTALL_CUDA}"]
    cards = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return list(dict.fromkeys(note for card in cards for note in notes(card, ["q4_k"])))
