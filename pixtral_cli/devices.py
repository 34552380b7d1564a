"""The text of `--devices` in, the devices it means out. Looks at no machine: how many GPUs there are is told to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pixtral_cli.errors import DeviceError

SPELLINGS = "cpu, gpu, gpu-0, gpu-0,gpu-1, gpu:0,1 or gpu:all"
INSTALL_CUDA = 'pip install --force-reinstall "torch>=2.11,<2.14" --index-url https://download.pytorch.org/whl/cu130'
"""What a torch that was built for CPUs only is replaced by; the versions are those of pyproject.toml."""
NO_CUDA = "The torch that is installed here is built for CPUs only, so it cannot use a GPU."

_DASHED = re.compile(r"gpu-\d+(,gpu-\d+)*")
_LISTED = re.compile(r"gpu:\d+(,\d+)*")


@dataclass(frozen=True)
class Devices:
    """`gpus` holds GPU numbers counted from 0; None means all of the machine's."""

    kind: Literal["cpu", "gpu"]
    gpus: tuple[int, ...] | None = ()

    def torch_name(self, gpus_here: int, built_for_gpus: bool = True) -> str:
        """The one device to run on, as torch calls it: `cpu` or `cuda:N`. Of torch, it says how many GPUs it sees, and
        whether it could see any.

        Raises DeviceError when a GPU is not there, and for several GPUs, which do not work yet.
        """
        if self.kind == "cpu":
            return "cpu"
        wanted = tuple(range(gpus_here)) if self.gpus is None else self.gpus
        absent = [number for number in wanted if number >= gpus_here]
        if gpus_here and absent:
            there = "gpu-0" if gpus_here == 1 else f"gpu-0 to gpu-{gpus_here - 1}"
            raise DeviceError(f"This machine has no gpu-{absent[0]}; it has {there}.", "Choose one of those.")
        if len(wanted) > 1:
            raise DeviceError("Running on several GPUs does not work yet.", f"Use --devices gpu-{wanted[0]}.")
        if not built_for_gpus:
            raise DeviceError(NO_CUDA, f"Install one for CUDA: {INSTALL_CUDA} (or use --devices cpu).")
        if not gpus_here:
            raise DeviceError(
                "torch finds no GPU on this machine.",
                "If it has one, `nvidia-smi` should list it: install NVIDIA's driver, give a container its GPUs "
                "(--gpus all), or unset CUDA_VISIBLE_DEVICES. Else use --devices cpu.",
            )
        return f"cuda:{wanted[0]}"


def parse(text: str) -> Devices:
    """Read `cpu`, `gpu`, `gpu-0`, `gpu-0,gpu-1`, `gpu:0,1` or `gpu:all`; DeviceError for anything else.

    >>> parse("gpu-0,gpu-1")
    Devices(kind='gpu', gpus=(0, 1))
    """
    compact = "".join(text.lower().split())
    if compact == "cpu":
        return Devices("cpu")
    if compact == "gpu":
        return Devices("gpu", (0,))
    if compact == "gpu:all":
        return Devices("gpu", None)
    if not (_DASHED.fullmatch(compact) or _LISTED.fullmatch(compact)):
        raise DeviceError(f"{text!r} names no devices.", f"Write {SPELLINGS}.")
    numbers = tuple(int(number) for number in re.findall(r"\d+", compact))
    if len(set(numbers)) < len(numbers):
        raise DeviceError(f"{text!r} names a GPU twice.", "Name each GPU once.")
    return Devices("gpu", numbers)


def default(gpus_here: int) -> str:
    """Where to run when nobody said: the first GPU if there is one, else the cpu."""
    return "cuda:0" if gpus_here else "cpu"
