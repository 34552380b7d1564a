"""An encoding's name in, the bits that a weight takes on a card out. Knows no torch, for plans come before that."""

from __future__ import annotations

from weights_cache.encodings import ENCODINGS

UNIT = (16, 256)
"""Rows and columns that packed_matmul.cu reads at a time; other matrices stay as their file has them."""
UNIT_BYTES = {
    "q4_0": 2048 + 256,  # codes; a float16 scale for 32 weights
    "q4_k": 2048 + 2 * 128 + 64,  # codes; scales and offsets as bytes; two float16 factors for 256 weights
    "q5_k": 2048 + 512 + 2 * 128 + 64,  # a fifth bit
    "q6_k": 2048 + 1024 + 256 + 32,  # four bits, two bits; scales; a factor for 256 weights
    "q8_0": 2 * 2048 + 256,
    "fp8": 2 * 2048 + 128,  # a float32 scale for 128 weights, whatever has one in a file
    "nf4": 2048 + 256,  # a float32 magnitude for 64 weights, double quantisation or not
}
BUFFER = 256 * 2**20
"""Bytes of the one buffer of a card, into which weights are decoded for products of many rows."""


def fits(encoding: str, rows: int, columns: int) -> bool:
    """Whether a matrix [rows, columns] can be laid out for the card's kernel."""
    return encoding in UNIT_BYTES and rows > 0 and rows % UNIT[0] == 0 and columns % UNIT[1] == 0


def bits_on_card(encoding: str, rows: int, columns: int) -> float:
    """Bits a weight of a linear layer [rows, columns] takes on a card: 4.625 in q4_k, which has 4.5 in a file."""
    if not fits(encoding, rows, columns):
        return ENCODINGS[encoding].bits
    return UNIT_BYTES[encoding] * 8 / (UNIT[0] * UNIT[1])
