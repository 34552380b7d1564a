"""Products of a few rows, straight from the bytes of a file, on every path of instructions of this machine.

The oracle is the codec's decode, multiplied in float64. Letters: N rows of x, R rows of the weight, C columns.
"""

import pytest
import torch
from support import packed_bytes
from support.packed_bytes import BLOCKS, PACKED, SCALES

from pixtral_cli.model.kernels import KernelLinear, native
from pixtral_cli.model.kernels.cpu_rows import MANY, CpuRowsKernel, Together
from weights_cache.codecs.fp8 import FP8

CPU = torch.device("cpu")
ENCODINGS = (*PACKED, "bfloat16", "float32")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
pytestmark = pytest.mark.usefixtures("instructions")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(weight):
    return (weight if isinstance(weight, torch.Tensor) else weight.decoded()).double()


def multiplied(weight, x):
    return Together([CpuRowsKernel(weight, CPU)]).few(x)


def assert_product(found, x, weight):
    """Within one rounding of the result in bfloat16, and what float32 sums may lose."""
    weight, x = exact(weight), x.double()
    wanted, size = x @ weight.T, x.abs() @ weight.abs().T
    rounding = 2**-8 if found.dtype == torch.bfloat16 else 0.0
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= rounding * wanted.abs() + 1e-5 * size).all()


def columns_of(encoding):
    """One block; what fills no register; many."""
    block = BLOCKS.get(encoding, 32)
    return block, 3 * block, 5 * block, 2304


@DTYPES
@pytest.mark.parametrize("rows", [1, 15, 33])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_few_rows_are_multiplied_with_the_weights_as_they_are(encoding, rows, dtype):
    for columns in columns_of(encoding):
        weight = packed_bytes.weight(encoding, rows, columns, at=3)
        for count in range(1, 10):
            x = random(count, columns, seed=count).to(dtype)
            assert_product(multiplied(weight, x), x, weight)


@DTYPES
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_row_has_the_same_bits_whatever_stands_beside_it_and_whoever_computes(encoding, dtype, monkeypatch):
    weight = packed_bytes.weight(encoding, 200, 1280)
    x = random(MANY - 1, 1280).to(dtype)
    monkeypatch.setattr(native, "threads", lambda: 3)
    together = multiplied(weight, x)
    monkeypatch.setattr(native, "threads", lambda: 1)
    for count in range(1, MANY):
        assert torch.equal(multiplied(weight, x[-count:]), together[-count:])


@DTYPES
@pytest.mark.parametrize(
    "encodings",
    [("q4_k", "q5_k", "q6_k"), ("q4_0", "nf4"), ("q8_0", "q4_0", "nf4", "q8_0"), ("fp8", "bfloat16", "fp8")],
    ids=str,
)
def test_matrices_of_one_x_give_the_bits_that_each_gives_alone(encodings, dtype):
    weights = [packed_bytes.weight(name, 40 + n, 768, seed=n) for n, name in enumerate(encodings)]
    kernels = [CpuRowsKernel(weight, CPU) for weight in weights]
    for count in (1, 2, 6):
        x = random(count, 768, seed=count).to(dtype)
        alone = [multiplied(weight, x) for weight in weights]
        assert torch.equal(Together(kernels).few(x), torch.cat(alone, 1))


@DTYPES
@pytest.mark.parametrize("scale", [0.0, -0.0, 2.0**-24, -(2.0**-15), 65504.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("encoding", SCALES)
def test_scales_may_be_subnormal_or_infinite(encoding, scale, dtype):
    weight, x = packed_bytes.weight(encoding, 9, 512, scale=scale), random(3, 512).to(dtype)
    wanted = x.float() @ exact(weight).float().T
    found = multiplied(weight, x).float()
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
    if torch.tensor(scale).isfinite():
        assert_product(found.to(dtype), x, weight)


@DTYPES
@pytest.mark.parametrize(("columns", "scales"), [(576, 5), (256, 2), (1280, 20), (160, 2), (96, 1)])
def test_fp8_may_have_a_scale_for_each_block_of_columns(columns, scales, dtype):
    weight = packed_bytes.fp8(19, columns, torch.Generator().manual_seed(0), scales=scales, at=3)
    for count in range(1, 10):
        x = random(count, columns, seed=count).to(dtype)
        assert_product(multiplied(weight, x), x, weight)


@DTYPES
@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-3, 2.0**110])
def test_every_code_of_fp8_means_the_same_everywhere(scale, dtype):
    """Each code in each of 64 columns, alone; x is such that nothing is too small or too large for bfloat16."""
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[(codes & 127) != 127]
    weight = FP8(
        (torch.eye(64, dtype=torch.uint8) * codes[:, None, None]).flatten(0, 1), torch.full((254 * 64, 1), scale)
    )
    x = torch.full((1, 64), 2.0**100 if scale < 1 else 0.5, dtype=dtype)
    wanted = codes.view(torch.float8_e4m3fn).float() * scale * x[0, 0].float()
    assert torch.equal(multiplied(weight, x)[0].float(), wanted.repeat_interleave(64))


@DTYPES
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_number_that_is_none_spoils_the_row_that_it_is_in_and_no_other(encoding, dtype):
    weight, x = packed_bytes.weight(encoding, 20, 512), random(6, 512).to(dtype)
    good = multiplied(weight, x)
    x[1, 100], x[3, 511], x[4, 0] = torch.nan, torch.inf, -torch.inf
    found = multiplied(weight, x)
    assert torch.equal(found[[0, 2, 5]], good[[0, 2, 5]])
    wanted = x.float() @ exact(weight).float().T
    assert torch.equal(found.isnan(), wanted.isnan()) and found[1].isnan().all()
    assert torch.equal(found[found.isinf()].float(), wanted[wanted.isinf()])


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, MANY - 1, MANY, 40])
def test_a_layer_takes_any_number_of_rows(rows, dtype):
    weight, x = packed_bytes.weight("q4_k", 70, 512), random(rows, 512).to(dtype)
    found = KernelLinear(CpuRowsKernel(weight, CPU))(x)
    assert found.shape == (rows, 70) and found.dtype == dtype
    assert (found.double() - x.double() @ exact(weight).T).norm() <= 1e-2 * exact(weight).norm() * (rows**0.5 + 1)


def test_x_of_another_width_is_refused():
    weight = packed_bytes.weight("q4_0", 8, 64)
    with pytest.raises(AssertionError, match="96 numbers, times matrices of 64"):
        multiplied(weight, random(1, 96))
