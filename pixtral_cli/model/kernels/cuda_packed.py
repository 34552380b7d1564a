"""Multiplying with packed weights on a CUDA card, straight from packed memory for few rows. Knows no checkpoint.

The kernels are in packed_matmul.cu. For many rows the weights are decoded into one buffer, which all matrices of a card
share, and multiplied with by cuBLAS: so all products of a card go through one stream at a time. Everything can be
captured in a CUDA graph. Letters: N rows of x, C columns, R rows of the weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pixtral_cli.model import card_bits
from pixtral_cli.model.card_bits import UNIT, UNIT_BYTES
from pixtral_cli.model.kernels import card_layout, nvrtc
from pixtral_cli.model.kernels.nvrtc import CompilationFailed, Function
from weights_cache.codecs.int4 import ROWS as INT4_ROWS
from weights_cache.codecs.int4 import Int4
from weights_cache.codecs.nf4 import BLOCK, NF4
from weights_cache.codecs.packed_rows import PackedRows
from weights_cache.packed import PackedWeight

LOG = logging.getLogger("pixtral_cli.model")

DECODED_FROM = 65  # rows of x, for which decoding the weights once is quicker than the kernel for few rows
VECTORS = 8  # of x that tensor cores multiply with at a time
DECODING_WARPS = 8  # of a block
TABLES = {"nf4": (65536, 2048)}  # bytes of shared memory for them, in products and in decoding


class Launch(NamedTuple):
    """How the kernel for few rows is run, see packed_matmul.cu. `per_processor` blocks go through all rows; 0: a block
    for each `tiles` of rows."""

    tiles: int
    stages: int
    warps: int
    per_processor: int = 0

    def shared(self, encoding: str, vector_tiles: int) -> int:
        """Bytes of shared memory of a block."""
        sums, units = 512 * vector_tiles, self.stages * UNIT_BYTES[encoding]
        return TABLES.get(encoding, (0, 0))[0] + self.warps * self.tiles * (sums + units)


def launch_for(encoding: str, rows: int, columns: int, card: nvrtc.Card) -> Launch:
    """What is quickest for a matrix, as tests/benchmarks/gpu_packed.py found it. The sums of a row, and so every bit of
    a result, are the same for any number of vectors."""
    units = columns // UNIT[1]
    most = min(units, 8)
    warps = max(range(min(units, 4), most + 1), key=lambda w: (units / (w * -(-units // w)), w))
    launch = Launch(1, 3, warps)
    if encoding == "nf4":
        launch = Launch(1, 2, min(units, 10), 2)
    while launch.shared(encoding, 2) > card.shared_per_block and launch.warps > 1:
        launch = launch._replace(warps=launch.warps // 2)
    return launch


class CudaPackedKernel:
    """W [R, C] in q4_0, q4_k, q6_k, q8_0 or nf4, x in bfloat16, on a CUDA card of compute capability 8.0 or newer.

    The bytes are put into the order of the kernel, on the card; none of the weight's own are kept.
    """

    def __init__(self, weight: Tensor | PackedWeight, device: torch.device) -> None:
        assert isinstance(weight, PackedRows | Int4 | NF4)
        self.encoding, self.shape = weight.encoding, weight.shape
        self._beside: NF4 | None = None
        self._units = _units(weight, device)
        if isinstance(weight, NF4) and (weight.nested or weight.block != BLOCK):
            self._beside = NF4(weight.codes[:0], **{
                name: part.to(device) for name, part in weight.tensors().items() if name != "codes"
            })  # fmt: skip
        self._buffer = _buffer(device)
        self.use(launch_for(self.encoding, *self.shape, nvrtc.card(device)))

    @classmethod
    def takes(cls, weight: Tensor | PackedWeight, dtype: torch.dtype, device: torch.device) -> bool:
        if device.type != "cuda" or dtype != torch.bfloat16 or not isinstance(weight, PackedRows | Int4 | NF4):
            return False
        if not card_bits.fits(weight.encoding, *weight.shape):
            return False
        return (not isinstance(weight, NF4) or weight.block >= BLOCK) and why_not(weight.encoding, device) is None

    @property
    def products(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {1: self._few, DECODED_FROM: self._many}

    @property
    def nbytes(self) -> int:
        """On the card, without the buffer that all weights share."""
        return self._units.nbytes + (0 if self._beside is None else self._beside.nbytes)

    @property
    def weight(self) -> PackedRows | NF4:
        """The weight as it came, in rows: made anew from the kernel's own order."""
        parts = self._units.split(card_layout.rows_at_once(self.shape[1]) // UNIT[0])
        if self.encoding != "nf4":
            unpack = card_layout.LAYOUTS[self.encoding].unpack
            return PackedRows(self.encoding, torch.cat([unpack(part) for part in parts]))
        codes, magnitudes = (torch.cat(found) for found in zip(*map(card_layout.unpack_nf4, parts), strict=True))
        if self._beside is None:
            return NF4(codes, magnitudes.flatten())
        return NF4(codes, **{name: part for name, part in self._beside.tensors().items() if name != "codes"})

    def decode(self, start: int, stop: int, out: Tensor) -> None:
        """Rows [start, stop), whole tiles of 16, into bfloat16 `out` [stop - start, C], as the codec decodes them."""
        tiles, units = (stop - start) // UNIT[0], self.shape[1] // UNIT[1]
        blocks = -(-tiles * units // DECODING_WARPS)
        shared = TABLES.get(self.encoding, (0, 0))[1]
        function = self._functions[1]["decode"]
        function(blocks, 32 * DECODING_WARPS, shared, self._units, out, start // UNIT[0], tiles, units)

    def use(self, launch: Launch, most: int = 2 * VECTORS) -> None:
        """Run the kernel for few rows like this, with at most so many of them at a time."""
        self._launches = {1: launch, 2: launch._replace(tiles=1)}  # else there would be too few registers
        self._functions = {
            tiles: _functions(self.encoding, self._launches[tiles], tiles, self._units.device)
            for tiles in range(1, most // VECTORS + 1)
        }

    def _few(self, x: Tensor) -> Tensor:
        """Slices of at most 16 rows of x, each in one go."""
        most = VECTORS * len(self._functions)
        x = x.contiguous()
        if x.data_ptr() % 16:
            x = x.clone()
        y = x.new_empty(len(x), self.shape[0])
        for some, found in zip(x.split(most), y.split(most), strict=True):
            self._multiply(some, found)
        return y

    def _multiply(self, x: Tensor, y: Tensor) -> None:
        device, vector_tiles = self._units.device, -(-len(x) // VECTORS)
        launch = self._launches[vector_tiles]
        row_tiles = self.shape[0] // UNIT[0]
        blocks = -(-row_tiles // launch.tiles)
        if launch.per_processor:
            blocks = min(blocks, launch.per_processor * nvrtc.card(device).processors)
        function = self._functions[vector_tiles]["product"]
        shared = launch.shared(self.encoding, vector_tiles)
        units = self.shape[1] // UNIT[1]
        function(blocks, 32 * launch.warps, shared, self._units, x, y, row_tiles, units, len(x))

    def _many(self, x: Tensor) -> Tensor:
        """As many rows of the weight at a time as the buffer holds."""
        rows, columns = self.shape
        y = x.new_empty(len(x), rows)
        step = self._buffer.numel() // columns // UNIT[0] * UNIT[0]
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            decoded = self._buffer[: (stop - start) * columns].view(-1, columns)
            self.decode(start, stop, decoded)
            if (start, stop) == (0, rows):
                torch.mm(x, decoded.T, out=y)
            else:
                y[:, start:stop] = x @ decoded.T
        return y


@cache
def why_not(encoding: str, device: torch.device) -> str | None:
    """Why the kernels cannot be used for weights in `encoding` on `device`, said once in the log; None where they
    can."""
    try:
        _functions(encoding, launch_for(encoding, *UNIT, nvrtc.card(device)), 1, device)
    except (CompilationFailed, OSError, RuntimeError) as error:
        LOG.warning("Weights in %s are multiplied with slowly on %s: %s", encoding, device, error)
        return str(error)
    return None


def _functions(encoding: str, launch: Launch, vector_tiles: int, device: torch.device) -> dict[str, Function]:
    """`product` and `decode`, with as much shared memory as they want."""
    found = _compiled(encoding, launch.tiles, launch.stages, vector_tiles, device)
    found["product"].allow(launch.shared(encoding, vector_tiles))
    return found


@cache
def _compiled(encoding: str, tiles: int, stages: int, vector_tiles: int, device: torch.device) -> dict[str, Function]:
    source = Path(__file__).with_name("packed_matmul.cu").read_text()
    return nvrtc.load(source, macros(encoding, tiles, stages, vector_tiles), ("product", "decode"), device)


def macros(encoding: str, tiles: int, stages: int, vector_tiles: int) -> list[str]:
    """What packed_matmul.cu is compiled with."""
    values = {"ENCODING": encoding.upper(), "TILES": tiles, "N_TILES": vector_tiles, "STAGES": stages}
    return [f"-D{name}={value}" for name, value in values.items()]


_BUFFERS: WeakValueDictionary[torch.device, Tensor] = WeakValueDictionary()


def _buffer(device: torch.device) -> Tensor:
    """bfloat16, flat: one for all kernels of a device, there as long as one of them is."""
    buffer = _BUFFERS.get(device)
    if buffer is None:
        buffer = torch.empty(card_bits.BUFFER // 2, dtype=torch.bfloat16, device=device)
        _BUFFERS[device] = buffer
    return buffer


def _units(weight: PackedRows | Int4 | NF4, device: torch.device) -> Tensor:
    """The weight in the kernel's order, uint8 [R / 16, C / 256, bytes], made on the device some rows at a time."""
    rows, columns = weight.shape
    found = torch.empty(
        rows // UNIT[0], columns // UNIT[1], UNIT_BYTES[weight.encoding], dtype=torch.uint8, device=device
    )
    step = card_layout.rows_at_once(columns)
    for units, packed in zip(found.split(step // UNIT[0]), _packed(weight, step, device), strict=True):
        units.copy_(packed)
    return found


def _packed(weight: PackedRows | Int4 | NF4, step: int, device: torch.device) -> Iterator[Tensor]:
    rows, columns = weight.shape
    if isinstance(weight, NF4):
        codes = weight.in_rows().codes
        magnitudes = weight.to(device).magnitudes().repeat_interleave(weight.block // BLOCK)
        magnitudes = magnitudes[: rows * columns // BLOCK].view(rows, -1)
        for some, units in zip(codes.split(step), magnitudes.split(step), strict=True):
            yield card_layout.pack_nf4(some.to(device), units)
        return
    pack = card_layout.LAYOUTS[weight.encoding].pack
    for start in range(0, rows, step):
        some = slice(start, min(start + step, rows))
        yield pack(_rows(weight, some, device))


def _rows(weight: PackedRows | Int4, some: slice, device: torch.device) -> Tensor:
    """Those rows as the codec has them, on the device."""
    if isinstance(weight, PackedRows):
        return weight.rows[some].to(device)
    codes = weight.codes[some.start // INT4_ROWS : some.stop // INT4_ROWS]
    return Int4(weight.encoding, codes, weight.scales[:, :, some]).to(device).in_rows().rows
