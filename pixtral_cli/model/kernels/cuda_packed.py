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
from pixtral_cli.model.kernels.nvrtc import Function
from weights_cache.codecs import fp8
from weights_cache.codecs.fp8 import FP8
from weights_cache.codecs.nf4 import BLOCK, NF4
from weights_cache.codecs.packed_rows import PackedRows
from weights_cache.encodings import ENCODINGS
from weights_cache.packed import PackedWeight

logger = logging.getLogger("pixtral_cli.model")

DECODED_FROM = 49  # rows of x, for which decoding the weights once is quicker than the kernel for few rows
SLICES = {1: (1, 1), 8: (8, 1), 16: (8, 2)}
"""Most rows of x that are multiplied in one go -> VECTORS and N_TILES of packed_matmul.cu for them."""
DECODING_WARPS = 8  # of a block
TABLES = {"nf4": (65536, 2048)}  # bytes of shared memory for them, in products and in decoding


class Launch(NamedTuple):
    """How the kernel for few rows is run, see packed_matmul.cu. `per_processor` blocks go through all rows; 0: a block
    for each `tiles` of rows."""

    tiles: int
    stages: int
    warps: int
    per_processor: int = 0

    def shared(self, encoding: str, most: int) -> int:
        """Bytes of shared memory of a block, for slices of `most` rows of x."""
        sums, units = 512 * SLICES[most][1], self.stages * UNIT_BYTES[encoding]
        return TABLES.get(encoding, (0, 0))[0] + self.warps * self.tiles * (sums + units)


def launch_for(encoding: str, rows: int, columns: int, most: int, card: nvrtc.Card) -> Launch:
    """What is quickest for a matrix and slices of `most` rows of x: two units of memory for each warp, and warps that
    have equal parts of the columns, up to ten of them; fewer where registers are dear, so that several blocks share a
    processor.

    The tables of nf4 leave room for two blocks of eight warps, or for one that is larger, which does better with few
    rows. After the sweeps of tests/benchmarks/gpu_packed.py on an H100.
    """
    units = columns // UNIT[1]
    launch = Launch(1, 2, _equal_parts(units, 10 if SLICES[most][1] == 1 else 8))
    if encoding == "nf4":
        many = rows // UNIT[0] >= 8 * card.processors
        launch = Launch(1, 2, min(units, 8), 2) if many else Launch(1, 2, _equal_parts(units, 16), 1)
    while launch.shared(encoding, most) > card.shared_per_block and launch.warps > 1:
        launch = launch._replace(warps=launch.warps // 2)
    return launch


def _equal_parts(units: int, most: int) -> int:
    """Of numbers of warps up to `most` that of the most equal parts; the largest of those that are as good."""
    return max(
        range(1, min(units, most) + 1), key=lambda warps: (min(warps, 4), units / -(-units // warps) / warps, warps)
    )


class _Few(NamedTuple):
    """The kernel for a slice of few rows, and how it is launched."""

    launch: Launch
    function: Function
    blocks: int
    shared: int


class CudaPackedKernel:
    """W [R, C] in an encoding of `card_bits.UNIT_BYTES`, x in bfloat16, on a CUDA card (compute capability 8.0).

    The bytes are put into the order of the kernel, on the card; none of the weight's own are kept.
    """

    def __init__(self, weight: Tensor | PackedWeight, device: torch.device) -> None:
        assert isinstance(weight, PackedRows | NF4 | FP8)
        self.encoding, self.shape = weight.encoding, weight.shape
        self._block = weight.block if isinstance(weight, FP8) else None
        self._beside: NF4 | None = None
        self._units = _units(weight, device)
        if isinstance(weight, NF4) and (weight.nested or weight.block != BLOCK):
            self._beside = NF4(weight.codes[:0], **{
                name: part.to(device) for name, part in weight.tensors().items() if name != "codes"
            })  # fmt: skip
        self._buffer = _buffer(device)
        self._few: dict[int, _Few] = {}
        for most in SLICES:
            self.use(most, launch_for(self.encoding, *self.shape, most, nvrtc.card(device)))

    @classmethod
    def takes(cls, weight: Tensor | PackedWeight, dtype: torch.dtype, device: torch.device) -> bool:
        if device.type != "cuda" or dtype != torch.bfloat16 or not isinstance(weight, PackedRows | NF4 | FP8):
            return False
        if not card_bits.fits(weight.encoding, *weight.shape):
            return False
        if (isinstance(weight, NF4) and weight.block < BLOCK) or (isinstance(weight, FP8) and weight.block % fp8.BLOCK):
            return False
        return why_not(weight.encoding, device) is None

    @property
    def products(self) -> dict[int, Callable[[Tensor], Tensor]]:
        return {1: self._in_slices, DECODED_FROM: self._decoded}

    @property
    def nbytes(self) -> int:
        """On the card, without the buffer that all weights share."""
        return self._units.nbytes + (0 if self._beside is None else self._beside.nbytes)

    @property
    def weight(self) -> PackedRows | NF4 | FP8:
        """The weight as it came, in rows: made anew from the kernel's own order."""
        parts = self._units.split(card_layout.rows_at_once(self.shape[1]) // UNIT[0])
        if self._block is not None:
            codes, scales = (torch.cat(found) for found in zip(*map(card_layout.unpack_fp8, parts), strict=True))
            return FP8(codes, scales[:, :: self._block // fp8.BLOCK].contiguous())
        if self.encoding != "nf4":
            unpack = card_layout.PACKINGS[self.encoding].unpack
            return PackedRows(self.encoding, torch.cat([unpack(part) for part in parts]))
        codes, magnitudes = (torch.cat(found) for found in zip(*map(card_layout.unpack_nf4, parts), strict=True))
        if self._beside is None:
            return NF4(codes, magnitudes.flatten())
        return NF4(codes, **{name: part for name, part in self._beside.tensors().items() if name != "codes"})

    def decode(self, start: int, stop: int, out: Tensor) -> None:
        """Rows [start, stop), whole tiles of 16, into bfloat16 `out` [stop - start, C], as the codec decodes them."""
        tiles, units = (stop - start) // UNIT[0], self.shape[1] // UNIT[1]
        self._for_each_unit("decode", tiles * units, out, start // UNIT[0], tiles, units)

    def look_up(self, rows: Tensor) -> Tensor:
        """int64 [N] on the card -> those rows of the weight, bfloat16 [N, C], as the codec decodes them."""
        found = torch.empty(len(rows), self.shape[1], dtype=torch.bfloat16, device=rows.device)
        tiles, units = self.shape[0] // UNIT[0], self.shape[1] // UNIT[1]
        if len(rows):
            self._for_each_unit("look_up", len(rows) * units, rows.contiguous(), found, len(rows), tiles, units)
        return found

    def _for_each_unit(self, name: str, number: int, *arguments: Tensor | int) -> None:
        function = _functions(self.encoding, self._few[1].launch, 1, self._units.device)[name]
        shared = TABLES.get(self.encoding, (0, 0))[1]
        function(-(-number // DECODING_WARPS), 32 * DECODING_WARPS, shared, self._units, *arguments)

    def use(self, most: int, launch: Launch) -> None:
        """Multiply slices of `most` rows of x like this."""
        assert launch.warps <= self.shape[1] // UNIT[1], f"{launch.warps} warps share {self.shape[1]} columns"
        device, blocks = self._units.device, -(-self.shape[0] // (UNIT[0] * launch.tiles))
        if launch.per_processor:
            blocks = min(blocks, launch.per_processor * nvrtc.card(device).processors)
        function, shared = (
            _functions(self.encoding, launch, most, device)["product"],
            launch.shared(self.encoding, most),
        )
        function.allow(shared)
        self._few[most] = _Few(launch, function, blocks, shared)

    def _in_slices(self, x: Tensor) -> Tensor:
        """Straight from packed memory, which each slice of rows of x reads once."""
        x = x.contiguous()
        if x.data_ptr() % 16:
            x = x.clone()
        y = x.new_empty(len(x), self.shape[0])
        largest = max(SLICES)
        tiles, units = self.shape[0] // UNIT[0], self.shape[1] // UNIT[1]
        for some, found in zip(x.split(largest), y.split(largest), strict=True):
            few = self._few[next(most for most in SLICES if len(some) <= most)]
            few.function(
                few.blocks, 32 * few.launch.warps, few.shared, self._units, some, found, tiles, units, len(some)
            )
        return y

    def _decoded(self, x: Tensor) -> Tensor:
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
    """Why the kernels cannot be used for weights in `encoding` on `device`, said once in the log; None where they can,
    which is tried with a small matrix."""
    try:
        for most in SLICES:
            _functions(encoding, launch_for(encoding, *UNIT, most, nvrtc.card(device)), most, device)
        if not _multiplies(encoding, device):
            raise RuntimeError("the kernels give wrong products")
    except (OSError, RuntimeError) as error:
        logger.warning("Weights in %s are multiplied with slowly on %s: %s", encoding, device, error)
        return str(error)
    return None


@torch.no_grad()
def _multiplies(encoding: str, device: torch.device) -> bool:
    """Whether products and rows of a matrix of random bytes are right, but for rows that are not finite."""
    rows, columns, random = 64, 512, torch.Generator().manual_seed(0)
    weight = _random(encoding, rows, columns, random)
    kernel, exact = CudaPackedKernel(weight, device), weight.decoded()
    finite = exact.isfinite().all(1).nonzero().flatten()
    exact = exact[finite].double()
    x = torch.randn(max(SLICES) + 1, columns, generator=random).bfloat16()
    for some in (x[:number] for number in (*SLICES, len(x))):
        found = kernel.products[1](some.to(device)).cpu()[:, finite].double()
        if not ((found - some.double() @ exact.T).abs() <= 2**-7 * (some.double().abs() @ exact.abs().T)).all():
            return False
    decoded = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    kernel.decode(0, rows, decoded)
    looked_up = kernel.look_up(finite.to(device)).cpu()
    return torch.equal(looked_up, exact.bfloat16()) and torch.equal(looked_up, decoded.cpu()[finite])


def _random(encoding: str, rows: int, columns: int, random: torch.Generator) -> PackedRows | NF4 | FP8:
    stored = (rows, columns // 2 if encoding == "nf4" else ENCODINGS[encoding].row_bytes(columns))
    data = torch.randint(0, 256, stored, dtype=torch.uint8, generator=random)
    if encoding == "nf4":
        return NF4(data, torch.rand(rows * columns // BLOCK, generator=random))
    if encoding == "fp8":
        data -= (data & 127).eq(127).byte()  # those are no numbers
        return FP8(data, torch.rand(rows, columns // fp8.BLOCK, generator=random))
    return PackedRows(encoding, data)


@cache
def _functions(encoding: str, launch: Launch, most: int, device: torch.device) -> dict[str, Function]:
    """`product` for slices of `most` rows of x, `decode` and `look_up`."""
    return _compiled(tuple(macros(encoding, launch, most)), device)


@cache
def _compiled(options: tuple[str, ...], device: torch.device) -> dict[str, Function]:
    source = Path(__file__).with_name("packed_matmul.cu").read_text()
    return nvrtc.load(source, options, ("product", "decode", "look_up"), device)


def macros(encoding: str, launch: Launch, most: int) -> list[str]:
    """What packed_matmul.cu is compiled with."""
    vectors, vector_tiles = SLICES[most]
    values = {
        "ENCODING": encoding.upper(), "TILES": launch.tiles, "STAGES": launch.stages,
        "VECTORS": vectors, "N_TILES": vector_tiles,
    }  # fmt: skip
    return [f"-D{name}={value}" for name, value in values.items()]


_BUFFERS: WeakValueDictionary[torch.device, Tensor] = WeakValueDictionary()


def _buffer(device: torch.device) -> Tensor:
    """bfloat16, flat: one for all kernels of a device, there as long as one of them is."""
    buffer = _BUFFERS.get(device)
    if buffer is None:
        buffer = torch.empty(card_bits.BUFFER // 2, dtype=torch.bfloat16, device=device)
        _BUFFERS[device] = buffer
    return buffer


def _units(weight: PackedRows | NF4 | FP8, device: torch.device) -> Tensor:
    """The weight in the kernel's order, uint8 [R / 16, C / 256, bytes], made on the device some rows at a time."""
    rows, columns = weight.shape
    found = torch.empty(
        rows // UNIT[0], columns // UNIT[1], UNIT_BYTES[weight.encoding], dtype=torch.uint8, device=device
    )
    step = card_layout.rows_at_once(columns)
    for units, packed in zip(found.split(step // UNIT[0]), _packed(weight, step, device), strict=True):
        units.copy_(packed)
    return found


def _packed(weight: PackedRows | NF4 | FP8, step: int, device: torch.device) -> Iterator[Tensor]:
    if isinstance(weight, NF4):
        rows, columns = weight.shape
        magnitudes = weight.to(device).magnitudes().repeat_interleave(weight.block // BLOCK)
        magnitudes = magnitudes[: rows * columns // BLOCK].view(rows, -1)
        for some, units in zip(weight.codes.split(step), magnitudes.split(step), strict=True):
            yield card_layout.pack_nf4(some.to(device), units)
        return
    if isinstance(weight, FP8):
        each = max(1, weight.block // fp8.BLOCK)  # blocks of the card's that have one scale
        for some, scales in zip(weight.codes.split(step), weight.scales.split(step), strict=True):
            repeated = scales.to(device).repeat_interleave(each, 1)[:, : weight.shape[1] // fp8.BLOCK]
            yield card_layout.pack_fp8(some.to(device), repeated)
        return
    pack = card_layout.PACKINGS[weight.encoding].pack
    for rows in weight.rows.split(step):
        yield pack(rows.to(device))
