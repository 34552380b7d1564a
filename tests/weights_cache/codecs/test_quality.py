"""The squared error that encoding leaves, on weights of many kinds, against what ggml's own encoders leave.

The figures were measured once: `quantize_row_q4_0_ref`, `quantize_row_q4_K_ref` and `quantize_row_q6_K_ref` of ggml
0.21.0 (commit d99724f2, the state of llama.cpp d3cf1f14; what llama.cpp uses without an importance matrix) encoded
`weights(kind)`, gguf-py 0.19 decoded, and the squared error was averaged in float64.
"""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from weights_cache import codecs

ROWS, COLUMNS = 32, 2048


def _outliers(random, shape):
    """One weight in 200 is forty times larger than the rest."""
    plain = random.standard_normal(shape) * 0.02
    return np.where(random.random(shape) < 1 / 200, plain * 40, plain)


def _constant(random, shape):
    """Every run of 32 weights is one number; every fourth row is zero."""
    runs = np.repeat(random.standard_normal((shape[0], shape[1] // 32)) * 0.1, 32, axis=1)
    runs[::4] = 0
    return runs


KINDS = {
    "normal": lambda random, shape: random.standard_normal(shape) * 0.02,
    "heavy tails": lambda random, shape: random.standard_t(3, shape) * 0.02,
    "uniform": lambda random, shape: random.random(shape) * 0.1 - 0.05,
    "outliers": _outliers,
    "off centre": lambda random, shape: random.standard_normal(shape) * 0.02 + 0.05,
    "positive": lambda random, shape: np.abs(random.standard_normal(shape)) * 0.02,
    "constant": _constant,
    "tiny": lambda random, shape: random.standard_normal(shape) * 1e-6,
    "huge": lambda random, shape: random.standard_normal(shape) * 1e4,
}

MEAN_SQUARES = {
    "normal": 3.996559227e-04,
    "heavy tails": 1.163217333e-03,
    "uniform": 8.372910488e-04,
    "outliers": 3.665092477e-03,
    "off centre": 2.906244186e-03,
    "positive": 3.996559227e-04,
    "constant": 7.436274664e-03,
    "tiny": 9.991398066e-13,
    "huge": 9.991398061e07,
}
"""Of the weights that ggml encoded: where numpy's streams should change, the figures are for other weights."""

GGML_ERRORS = {
    "normal": {"q4_0": 2.978166504e-06, "q4_k": 2.070940931e-06, "q6_k": 1.281471073e-07},
    "heavy tails": {"q4_0": 1.825992727e-05, "q4_k": 9.653506120e-06, "q6_k": 7.791447313e-07},
    "uniform": {"q4_0": 3.551051511e-06, "q4_k": 2.484252286e-06, "q6_k": 1.468800326e-07},
    "outliers": {"q4_0": 3.921174953e-05, "q4_k": 2.550354021e-05, "q6_k": 3.928862425e-06},
    "off centre": {"q4_0": 1.074622797e-05, "q4_k": 2.614349901e-06, "q6_k": 4.768789770e-07},
    "positive": {"q4_0": 2.909415964e-06, "q4_k": 7.205039365e-07, "q6_k": 1.278891186e-07},
    "constant": {"q4_0": 3.421495278e-10, "q4_k": 2.867019488e-07, "q6_k": 9.250016087e-08},
    "tiny": {"q4_0": 1.095617973e-14, "q4_k": 9.107233165e-12, "q6_k": 9.991398066e-13},
    "huge": {"q4_0": 7.445320300e05, "q4_k": 5.175073718e05, "q6_k": 3.194721879e04},
}


def weights(kind):
    random = np.random.Generator(np.random.PCG64(20240917))
    return KINDS[kind](random, (ROWS, COLUMNS)).astype(np.float32)


def squared_errors(name, plain, packed):
    """Of each weight, in float64, decoded by gguf-py."""
    decoded = dequantize(packed, GGMLQuantizationType[name.upper()])
    return (decoded.astype(np.float64) - plain) ** 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q6_k"])
def test_the_squared_error_is_no_larger_than_what_ggml_leaves(name, kind):
    plain = weights(kind)
    assert np.square(plain, dtype=np.float64).mean() == pytest.approx(MEAN_SQUARES[kind], rel=1e-8)
    found = squared_errors(name, plain, codecs.get(name).encode(torch.from_numpy(plain)).numpy()).mean()
    assert found <= GGML_ERRORS[kind][name]


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_single_block_of_q4_0_or_q8_0_is_worse_than_in_gguf_py(name, kind):
    plain = weights(kind)
    theirs = squared_errors(name, plain, quantize(plain, GGMLQuantizationType[name.upper()])).reshape(-1, 32).sum(1)
    ours = squared_errors(name, plain, codecs.get(name).encode(torch.from_numpy(plain)).numpy()).reshape(-1, 32).sum(1)
    assert np.all(ours <= theirs * (1 + 1e-6))  # the candidates are compared in float32


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q6_k"])
def test_bfloat16_weights_are_encoded_as_the_same_weights_in_float32(name):
    """They repeat each other, so that ties for the largest occur; the error stays below what ggml leaves."""
    plain = torch.from_numpy(weights("normal")).bfloat16()
    packed = codecs.get(name).encode(plain)
    assert torch.equal(packed, codecs.get(name).encode(plain.float()))
    assert squared_errors(name, plain.float().numpy(), packed.numpy()).mean() <= GGML_ERRORS["normal"][name]
