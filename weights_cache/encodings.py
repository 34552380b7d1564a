"""ggml's numbers of tensor types, and how a row of each is stored. Knows no file and no torch; codecs/ decodes them."""

from collections.abc import Mapping
from typing import NamedTuple


class TensorType(NamedTuple):
    """How a tensor's row is stored: `block` weights take `block_bytes` bytes."""

    word: str
    encoding: str
    block: int
    block_bytes: int


TYPES: Mapping[int, TensorType] = {
    0: TensorType("F32", "float32", 1, 4),
    1: TensorType("F16", "float16", 1, 2),
    2: TensorType("Q4_0", "q4_0", 32, 18),
    3: TensorType("Q4_1", "q4_1", 32, 20),
    6: TensorType("Q5_0", "q5_0", 32, 22),
    7: TensorType("Q5_1", "q5_1", 32, 24),
    8: TensorType("Q8_0", "q8_0", 32, 34),
    10: TensorType("Q2_K", "q2_k", 256, 84),
    11: TensorType("Q3_K", "q3_k", 256, 110),
    12: TensorType("Q4_K", "q4_k", 256, 144),
    13: TensorType("Q5_K", "q5_k", 256, 176),
    14: TensorType("Q6_K", "q6_k", 256, 210),
    20: TensorType("IQ4_NL", "iq4_nl", 32, 18),
    23: TensorType("IQ4_XS", "iq4_xs", 256, 136),
    30: TensorType("BF16", "bfloat16", 1, 2),
}
"""ggml's numbers of the tensor types that can be read."""

NOT_READ: Mapping[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Types that ggml has and that have no codec here."""
