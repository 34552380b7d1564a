"""This machine in, its devices and the bytes that are free on them out. Knows no model.

Needs no torch but for what is free, and taken, on a GPU that torch has been given.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["cpu", "gpu"]

SMI_TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Device:
    """`name` as --devices takes it. `free` is in bytes, None where nobody says."""

    name: str
    free: int | None

    @property
    def kind(self) -> Kind:
        return "gpu" if self.name.startswith("gpu") else "cpu"


def devices() -> list[Device]:
    """This machine's: the cpu, then NVIDIA's GPUs in the order of their driver."""
    return [Device("cpu", free_memory()), *_gpus()]


def free_memory() -> int | None:
    """Bytes of memory that can be had now (page cache counts as free), or None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    there = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}.get("MemAvailable")
    limit = container_free()
    return there if limit is None or there is None else min(there, limit)


def container_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's own limit leaves (cgroup v2), the page cache not counted against it."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("file", 0))


def _gpus() -> list[Device]:
    """Asked of NVIDIA's own tool, which answers before torch is imported. None where GPUs are hidden or renumbered."""
    tool = shutil.which("nvidia-smi")
    if tool is None or "CUDA_VISIBLE_DEVICES" in os.environ:
        return []
    query = [tool, "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT, check=True).stdout
        rows = [line.split(",") for line in told.splitlines() if line.strip()]
        return [Device(f"gpu-{int(index)}", int(free) * 2**20) for index, free in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def kind_of(device: torch.device) -> Kind:
    return "cpu" if device.type == "cpu" else "gpu"


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be had on `device` now (page cache counts as free), or None where nobody says. On a GPU CUDA's
    context is there by then."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def taken_bytes(device: torch.device) -> int:
    """Bytes that torch has held on a GPU at most since the process began, or since its peak was reset: what
    `memory.Plan.taken` plans. CUDA's context and loaded kernels are not among them."""
    import torch

    return torch.cuda.max_memory_reserved(device)
