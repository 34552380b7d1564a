"""Reads weights files with layers that bitsandbytes encoded in 4 bits: each matrix is one tensor. Imports torch.

A `Reader` over all files of a folder, since a matrix and what belongs to it may lie in different ones.

Beside `X.weight`, the codes, such a file has `X.weight.absmax`, `.quant_map`, with double quantisation
`.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`: JSON as bytes, with shape, sizes of
blocks and the offset (bitsandbytes' `QuantState.as_dict(packed=True)`). Nothing of it is believed unchecked.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights_cache.codecs import nf4
from weights_cache.codecs.nf4 import BLOCKS, NESTED_BLOCK, NF4, TABLE
from weights_cache.errors import CheckpointCorrupt, QuantizedElsewhere
from weights_cache.json_fields import is_size, parse_json_object
from weights_cache.names import BITSANDBYTES_INT8, BITSANDBYTES_STATE
from weights_cache.packed import plain

from .reader import Reader, TensorInfo, merged
from .safetensors import WORDS

NF4_STATE = BITSANDBYTES_STATE + "nf4"
ENCODING = "nf4"
BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", NF4_STATE.removeprefix("."))


class BitsandbytesFiles:
    """`files`, opened, as one. Raises QuantizedElsewhere for its other encodings, fp4 and 8-bit integers; a state
    that contradicts itself or its tensors is CheckpointCorrupt when `tensors` is first asked for."""

    def __init__(self, files: Sequence[Reader]) -> None:
        self._of = merged(files)
        self._matrices = [name.removesuffix(NF4_STATE) for name in self._of if name.endswith(NF4_STATE)]
        for name, file in self._of.items():
            _, _, kind = name.partition(BITSANDBYTES_STATE)
            kind = "8-bit integers" if name.endswith(BITSANDBYTES_INT8) else kind
            if kind not in ("", ENCODING):
                raise QuantizedElsewhere(file.tensors[name].file, f"bitsandbytes' {kind}")

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The files' own names -> TensorInfo; of a matrix its true shape, and its magnitudes' bytes too."""
        parts = {f"{name}.{part}" for name in self._matrices for part in BESIDE}
        others = {name: file.tensors[name] for name, file in self._of.items() if name not in parts}
        return others | {name: self._matrix_info(name) for name in self._matrices}

    def weight(self, name: str) -> Tensor | NF4:
        """As in the file, memory-mapped: a matrix as it is encoded."""
        if name not in self._states:
            return self._stored(name)
        state = self._states[name]
        codes = self._stored(name).view(-1).view(torch.uint8).view(state["shape"][0], -1)
        beside = {part: self._stored(f"{name}.{part}").flatten() for part in _beside(state) if part != "quant_map"}
        if "nested_offset" in state:
            beside["nested_offset"] = torch.tensor([state["nested_offset"]])
        return NF4(codes, **beside)

    def release(self, name: str) -> None:
        """Small beside what it becomes: kept."""

    def _stored(self, name: str) -> Tensor:
        return plain(self._of[name].weight(name))

    @cached_property
    def _states(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: self._state(name) for name in self._matrices}

    def _state(self, name: str) -> Mapping[str, Any]:
        """The state of one matrix, checked against the tensors that belong to it."""
        matrix, source = self._of.get(name), self._of[name + NF4_STATE]
        path = source.tensors[name + NF4_STATE].file
        text = bytes(self._stored(name + NF4_STATE).view(-1).view(torch.uint8).tolist())
        state = parse_json_object(path, text, f"the state of {name!r}")
        if matrix is None:
            raise CheckpointCorrupt(path, f"it has a state of {name!r}, and the files do not hold that tensor")
        if reason := _wrong(state):
            raise CheckpointCorrupt(path, f"the state of {name!r} has {reason}")
        self._check(path, name, None, math.prod(state["shape"]) // 2)
        for part, (dtype, count) in _beside(state).items():
            self._check(path, f"{name}.{part}", dtype, count)
        self._check_table(path, name)
        return state

    def _check(self, path: Path, name: str, dtype: str | None, count: int) -> None:
        """Codes may be stored as any dtype (`bnb_4bit_quant_storage`): their bytes count."""
        if name not in self._of:
            raise CheckpointCorrupt(path, f"the tensor {name!r} is missing from it and from the files beside it")
        info = self._of[name].tensors[name]
        found = info.nbytes if dtype is None else math.prod(info.shape)
        if found != count or dtype not in (None, info.dtype):
            wanted = f"{count} bytes" if dtype is None else f"{count} numbers of {dtype}"
            reason = f"tensor {name!r} is {info.dtype} {list(info.shape)}, and its state asks for {wanted}"
            raise CheckpointCorrupt(info.file, reason)

    def _check_table(self, path: Path, name: str) -> None:
        """Kernels have the 16 values of NF4 built in, so a file must not bring others."""
        table = self._stored(f"{name}.quant_map").flatten().tolist()
        if not all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(table, TABLE, strict=True)):
            raise CheckpointCorrupt(path, f"{name}.quant_map has values that are not NF4's")

    def _matrix_info(self, name: str) -> TensorInfo:
        state, info = self._states[name], self._of[name].tensors[name]
        beside = (f"{name}.{part}" for part in _beside(state) if part != "quant_map")
        nbytes = info.nbytes + sum(self._of[each].tensors[each].nbytes for each in beside)
        return replace(info, shape=tuple(state["shape"]), nbytes=nbytes, encoding=ENCODING)


def _wrong(state: Mapping[str, Any]) -> str | None:
    """What in a matrix's state is none of the things that it can be."""
    shape, block = state.get("shape"), state.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(is_size, shape))):
        return f"the shape {str(shape)[:80]}, which is none of a matrix"
    if shape[1] % 2:
        return f"the shape {shape}, whose rows are no whole bytes"
    if block not in BLOCKS or isinstance(block, bool):
        return f"blocks of {str(block)[:80]}"
    if state.get("quant_type", ENCODING) != ENCODING:
        return f"the type {str(state['quant_type'])[:80]!r}"
    if "nested_offset" not in state:
        return None
    offset, nested = state["nested_offset"], state.get("nested_blocksize")
    if not isinstance(offset, float | int) or not math.isfinite(offset):
        return f"the offset {str(offset)[:80]}"
    return None if nested == NESTED_BLOCK else f"nested blocks of {str(nested)[:80]}"


def _beside(state: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """The tensors that stand beside a matrix's codes: of each its dtype, and how many numbers it has."""
    parts = nf4.beside(*state["shape"], block=state["blocksize"], nested="nested_offset" in state)
    words = {
        part: (WORDS[str(dtype).removeprefix("torch.")], math.prod(shape))
        for part, (dtype, shape) in parts.items()
        if part != "nested_offset"  # the state itself holds it
    }
    return {"quant_map": ("F32", len(TABLE)), **words}
