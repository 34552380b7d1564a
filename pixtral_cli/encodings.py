"""The names of the weight encodings and what each costs. Knows no tensors, so that `--help` can read it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pixtral_cli.errors import ModelError


@dataclass(frozen=True)
class Encoding:
    """`bits` a weight, scales included. Rows that are no multiple of `block` weights take `fallback` instead.

    `double_quantization` packs nf4's scales as well: 4.13 bits.
    """

    name: str
    bits: float
    block: int = 1
    fallback: str | None = None
    double_quantization: bool = False

    @property
    def packed(self) -> bool:
        """Whether weights take fewer bits than any number type of torch."""
        return self.bits < 16

    def for_width(self, columns: int) -> Encoding:
        """This, or the neighbour that rows of `columns` weights fit into."""
        if columns % self.block == 0 or self.fallback is None:
            return self
        return ENCODINGS[self.fallback].for_width(columns)


ENCODINGS = {
    encoding.name: encoding
    for encoding in (
        Encoding("float32", 32),
        Encoding("bfloat16", 16),
        Encoding("q6_k", 6.5625, 256, fallback="q8_0"),
        Encoding("q4_0", 4.5, 32, fallback="bfloat16"),
        Encoding("q4_k", 4.5, 256, fallback="q4_0"),
        Encoding("nf4", 4.5, 64, fallback="bfloat16"),
        Encoding("q8_0", 8.5, 32, fallback="bfloat16"),
    )
}
CHOICES = ("float32", "bfloat16", "q6_k", "q4_0", "q4_k", "nf4")


def find(name: str) -> Encoding:
    """The encoding of that name. Raises ModelError when it is not among CHOICES."""
    if name not in CHOICES:
        raise ModelError(f"The encoding {name!r} is not known.", hint=f"Known encodings: {', '.join(CHOICES)}.")
    return ENCODINGS[name]


def asked_for(name: str | None, double_quantization: bool = False) -> Encoding | None:
    """The encoding asked for, None where none is. Raises ModelError when it cannot be had in that way."""
    if double_quantization and name != "nf4":
        raise ModelError(
            f"Double quantisation is a form of nf4, and {name or 'no encoding'} is asked for.",
            hint="Ask for --quantization-encoding nf4, or leave --double-quantization out.",
        )
    return None if name is None else replace(find(name), double_quantization=double_quantization)
