"""How weights are stored: a name in, the sizes of its blocks out. Knows no torch and no bytes; codecs/ decodes them.

ONE table, for files, codecs, plans and help alike. Names are lower-case words of GGUF (q4_k is ggml's Q4_K), torch's
names of its dtypes, nf4, bitsandbytes' own, and fp8, which is e4m3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from .errors import WidthNotDivisible


@dataclass(frozen=True)
class Encoding:
    """`block` weights of a row take `block_bytes` bytes, their scales included; blocks lie one after the other.

    A row of 5120 weights in q4_k is 20 blocks of 256 weights in 144 bytes: `row_bytes(5120)` is 2880.

    `ggml` is the number of the tensor type in GGUF; `fallback` names what rows take instead that are no whole number
    of blocks. With `double_quantization` nf4's scales are quantised as well: 4.13 bits. `beside_row` are bytes of each
    row of a matrix that do not lie in its blocks.
    """

    name: str
    block: int
    block_bytes: int
    ggml: int | None = None
    fallback: str | None = None
    double_quantization: bool = False
    beside_row: int = 0

    @property
    def word(self) -> str:
        """Its name in the headers of GGUF and safetensors: Q4_K, BF16, F32."""
        return self.name.upper().replace("BFLOAT", "BF").replace("FLOAT", "F")

    @property
    def bits(self) -> float:
        """Bits a weight, scales in its blocks included."""
        return self.block_bytes * 8 / self.block

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of that shape, the last dimension that of its rows."""
        return int(prod(shape) * self.bits / 8) + (prod(shape[:-1]) * self.beside_row if len(shape) > 1 else 0)

    @property
    def packed(self) -> bool:
        """Whether weights take fewer bits than any number type of torch."""
        return self.bits < 16

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` weights is a whole number of blocks."""
        return columns % self.block == 0

    def stored_shape(self, rows: int, columns: int) -> tuple[int, int] | None:
        """The shape of a matrix's bytes in a file, None if its rows are no whole number of them: [rows, row_bytes].
        Of nf4 they are the codes alone, two in a byte, and of fp8 too."""
        if self.name == "nf4":
            return None if columns % 2 else (rows, columns // 2)
        return (rows, self.row_bytes(columns)) if self.fits(columns) else None

    def for_width(self, columns: int) -> Encoding:
        """This, or the neighbour that rows of `columns` weights fit into."""
        if self.fits(columns) or self.fallback is None:
            return self
        return ENCODINGS[self.fallback].for_width(columns)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a packed row of `columns` weights; raises WidthNotDivisible."""
        if not self.fits(columns):
            raise WidthNotDivisible(self.name, columns, self.block)
        return columns // self.block * self.block_bytes

    def columns(self, row_bytes: int) -> int:
        """Weights in a packed row of `row_bytes` bytes; raises WidthNotDivisible."""
        if row_bytes % self.block_bytes:
            raise WidthNotDivisible(self.name, row_bytes, self.block_bytes, unit="bytes")
        return row_bytes // self.block_bytes * self.block


ENCODINGS: Mapping[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        Encoding("float32", 1, 4, ggml=0),
        Encoding("float16", 1, 2, ggml=1),
        Encoding("bfloat16", 1, 2, ggml=30),
        Encoding("q4_0", 32, 18, ggml=2, fallback="bfloat16"),
        Encoding("q4_1", 32, 20, ggml=3),
        Encoding("q5_0", 32, 22, ggml=6),
        Encoding("q5_1", 32, 24, ggml=7),
        Encoding("q8_0", 32, 34, ggml=8, fallback="bfloat16"),
        Encoding("q2_k", 256, 84, ggml=10),
        Encoding("q3_k", 256, 110, ggml=11),
        Encoding("q4_k", 256, 144, ggml=12, fallback="q4_0"),
        Encoding("q5_k", 256, 176, ggml=13),
        Encoding("q6_k", 256, 210, ggml=14, fallback="q8_0"),
        Encoding("iq4_nl", 32, 18, ggml=20),
        Encoding("iq4_xs", 256, 136, ggml=23),
        Encoding("nf4", 64, 36, fallback="bfloat16"),  # with double quantisation 33.02 bytes
        Encoding("fp8", 1, 1, beside_row=4),  # a scale; in some files for each 128 weights
    )
}

GGML: Mapping[int, Encoding] = {each.ggml: each for each in ENCODINGS.values() if each.ggml is not None}
"""By ggml's numbers of tensor types: those that can be read."""

GGML_NOT_READ: Mapping[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Types that ggml has and that have no codec here."""
