"""CUDA source in, functions to launch out: compiled by NVRTC, which torch brings along. Knows no kernel.

No toolkit and no header is needed. What was compiled is kept on disk, and found again in milliseconds.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from weights_cache.cache import own_cache_folder, replacing

MOST_STATIC_SHARED = 48 * 2**10  # bytes a block may have unasked
DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
PROCESSORS, SHARED_PER_PROCESSOR, SHARED_PER_BLOCK = 16, 81, 97  # CU_DEVICE_ATTRIBUTE_...


class CudaFailed(RuntimeError):
    """NVRTC or the driver is missing, or refuses something: the text says what."""


@dataclass(frozen=True)
class Card:
    """What a launch is fitted to; sizes in bytes. `sm` is 90 for compute capability 9.0."""

    sm: int
    processors: int
    shared_per_processor: int
    shared_per_block: int


class Function:
    """One kernel, ready to launch on the device that it was loaded for."""

    def __init__(self, handle: c_void_p, device: torch.device) -> None:
        self._handle, self._device, self._shared = handle, device, MOST_STATIC_SHARED

    def __call__(self, blocks: int, threads: int, shared: int, *arguments: torch.Tensor | int) -> None:
        """Launch on torch's current stream. Tensors go as their addresses, numbers as 32-bit integers.

        Works while a CUDA graph is captured, if `allow` was called for as much shared memory before.
        """
        values = [c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else c_int(x) for x in arguments]
        addresses = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        with _Context(self._device):
            self.allow(shared)
            _check(
                _driver().cuLaunchKernel(
                    self._handle, c_uint(blocks), c_uint(1), c_uint(1), c_uint(threads), c_uint(1), c_uint(1),
                    c_uint(shared), stream, addresses, None,
                ),
                "launching a kernel",
            )  # fmt: skip

    def allow(self, shared: int) -> None:
        """Let blocks have so many bytes of dynamic shared memory."""
        if shared > self._shared:
            with _Context(self._device):
                _check(_driver().cuFuncSetAttribute(self._handle, DYNAMIC_SHARED, c_int(shared)), "shared memory")
            self._shared = shared


def load(source: str, options: Sequence[str], names: Sequence[str], device: torch.device) -> dict[str, Function]:
    """The kernels `names` (extern "C") of `source`, on `device`; raises CudaFailed."""
    cubin, module = compiled(source, options, card(device).sm), c_void_p()
    found = {}
    with _Context(device):
        _check(_driver().cuModuleLoadData(byref(module), c_char_p(cubin)), "loading kernels")
        for name in names:
            handle = c_void_p()
            _check(_driver().cuModuleGetFunction(byref(handle), module, name.encode()), f"finding {name}")
            found[name] = Function(handle, device)
    return found


def compiled(source: str, options: Sequence[str], sm: int) -> bytes:
    """Machine code for `sm`, from the cache where it is there; raises CudaFailed. Needs no GPU."""
    key = hashlib.sha256("\0".join([source, *options, str(sm), str(version())]).encode()).hexdigest()
    path = own_cache_folder() / "kernels" / f"{key[:32]}.cubin"
    with suppress(OSError):
        return path.read_bytes()
    cubin, _ = _compile(source, options, sm)
    with suppress(OSError), replacing(path) as partial:  # where nothing can be written it is compiled again next time
        partial.write_bytes(cubin)
    return cubin


def _compile(source: str, options: Sequence[str], sm: int) -> tuple[bytes, str]:
    """Machine code for `sm` and the compiler's log, without a GPU."""
    nvrtc, program = _nvrtc(), c_void_p()
    flags = [f"--gpu-architecture=sm_{sm}", "--std=c++17", *options]
    _check_nvrtc(nvrtc.nvrtcCreateProgram(byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        array = (c_char_p * len(flags))(*(flag.encode() for flag in flags))
        status, size = nvrtc.nvrtcCompileProgram(program, len(flags), array), c_size_t()
        _check_nvrtc(nvrtc.nvrtcGetProgramLogSize(program, byref(size)))
        log = ctypes.create_string_buffer(size.value)
        _check_nvrtc(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.value.decode(errors="replace").strip()
        if status:
            raise CudaFailed(f"NVRTC refuses the source for sm_{sm}: {text or status}")
        _check_nvrtc(nvrtc.nvrtcGetCUBINSize(program, byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check_nvrtc(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin.raw, text
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


@cache
def version() -> tuple[int, int]:
    """NVRTC's own; raises CudaFailed where there is none."""
    major, minor = c_int(), c_int()
    _check_nvrtc(_nvrtc().nvrtcVersion(byref(major), byref(minor)))
    return major.value, minor.value


@cache
def _nvrtc() -> ctypes.CDLL:
    """The one in the wheels beside torch's; else that of the system. What it opens itself it does not always find, and
    so that is opened before."""
    major = (torch.version.cuda or "").partition(".")[0]
    beside = Path(torch.__file__).parents[1] / "nvidia"
    wheels = sorted(beside.glob(f"c*/lib/libnvrtc.so.{major or '1?'}"), reverse=True)  # cu13, cuda_nvrtc
    for name in [*map(str, wheels), f"libnvrtc.so.{major}", "libnvrtc.so"]:
        with suppress(OSError):
            for builtins in Path(name).parent.glob("libnvrtc-builtins.so.*") if name.startswith("/") else ():
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(name)
    raise CudaFailed("there is no libnvrtc beside torch")


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaFailed(f"there is no driver: {error}") from error


@cache
def card(device: torch.device) -> Card:
    """What `device` has."""
    major, minor = torch.cuda.get_device_capability(device)
    return Card(10 * major + minor, *(
        _attribute(device, number) for number in (PROCESSORS, SHARED_PER_PROCESSOR, SHARED_PER_BLOCK)
    ))  # fmt: skip


def _attribute(device: torch.device, number: int) -> int:
    value = c_int()
    _check(_driver().cuDeviceGetAttribute(byref(value), number, _ordinal(device)), "asking for an attribute")
    return value.value


def _ordinal(device: torch.device) -> c_int:
    """The driver's name of the device."""
    torch.cuda.init()
    found = c_int()
    index = torch.cuda.current_device() if device.index is None else device.index
    _check(_driver().cuDeviceGet(byref(found), c_int(index)), "finding a device")
    return found


class _Context:
    """torch's context of `device`, made the current one of this thread where it is not: a new thread has none."""

    def __init__(self, device: torch.device) -> None:
        self._wanted, self._pushed = _primary_context(device), False

    def __enter__(self) -> None:
        current = c_void_p()
        _check(_driver().cuCtxGetCurrent(byref(current)), "asking for the context")
        if current.value != self._wanted.value:
            _check(_driver().cuCtxPushCurrent_v2(self._wanted), "entering a context")
            self._pushed = True

    def __exit__(self, *_: object) -> None:
        if self._pushed:
            _check(_driver().cuCtxPopCurrent_v2(byref(c_void_p())), "leaving a context")


@cache
def _primary_context(device: torch.device) -> c_void_p:
    """That of torch, kept as long as the program runs."""
    context = c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(byref(context), _ordinal(device)), "finding the context")
    return context


def _check(status: int, doing: str) -> None:
    if status:
        text = c_char_p()
        _driver().cuGetErrorString(status, byref(text))
        raise CudaFailed(f"CUDA, {doing}: {(text.value or b'unknown error').decode()} ({status})")


def _check_nvrtc(status: int) -> None:
    if status:
        raise CudaFailed(f"NVRTC fails with error {status}")
