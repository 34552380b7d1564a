"""Rows decoded by the library in C, on every path of instructions of this machine: as the codecs do, to the bit."""

import pytest
import torch
from support import packed_bytes
from support.packed_bytes import BLOCKS, PACKED

from pixtral_cli.model.kernels import native_matrix
from weights_cache.codecs.fp8 import FP8
from weights_cache.codecs.nf4 import BLOCKS as NF4_BLOCKS
from weights_cache.codecs.nf4 import NF4
from weights_cache.packed import PackedRows

pytestmark = pytest.mark.usefixtures("instructions")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def decoded(weight, dtype):
    matrix = native_matrix.matrix_of(weight)
    return native_matrix.decode(matrix, 0, torch.empty(weight.shape, dtype=dtype))


def exact(weight, dtype):
    return (weight if isinstance(weight, torch.Tensor) else weight.decoded()).to(dtype)


def assert_same_bits(found, wanted):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.equal(found.isnan(), wanted.isnan())
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[found.dtype]
    assert torch.equal(
        found.nan_to_num(0.0, torch.inf, -torch.inf).view(whole),
        wanted.nan_to_num(0.0, torch.inf, -torch.inf).view(whole),
    )


@DTYPES
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("encoding", [*PACKED, "bfloat16", "float32"])
def test_rows_of_one_block_and_of_many_are_those_of_the_codec(encoding, rows, dtype):
    narrow = BLOCKS.get(encoding, 32)
    for columns in (narrow, 3 * narrow, 2304):
        weight = packed_bytes.weight(encoding, rows, columns)
        assert_same_bits(decoded(weight, dtype), exact(weight, dtype))


@DTYPES
@pytest.mark.parametrize("at", [1, 2, 63])
@pytest.mark.parametrize("encoding", packed_bytes.SCALES)
def test_bytes_may_begin_anywhere(encoding, at, dtype):
    weight = packed_bytes.weight(encoding, 5, 512, at=at)
    assert weight.rows.data_ptr() % 64 == at
    assert_same_bits(decoded(weight, dtype), exact(weight, dtype))


@DTYPES
@pytest.mark.parametrize("encoding", packed_bytes.SCALES)
def test_rows_may_lie_apart(encoding, dtype):
    wide = packed_bytes.weight(encoding, 6, 1024)
    weight = PackedRows(encoding, wide.rows[::2, : wide.rows.shape[1] // 2])
    assert_same_bits(decoded(weight, dtype), exact(weight, dtype))


@DTYPES
@pytest.mark.parametrize("scale", [0.0, -0.0, 2.0**-24, -(2.0**-15), 65504.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("encoding", packed_bytes.SCALES)
def test_scales_may_be_subnormal_or_infinite(encoding, scale, dtype):
    weight = packed_bytes.weight(encoding, 3, 256, scale=scale)
    assert_same_bits(decoded(weight, dtype), exact(weight, dtype))


@DTYPES
def test_every_scale_that_there_is_means_the_same(dtype):
    scales = torch.arange(-(2**15), 2**15).to(torch.int16)[:, None].view(torch.uint8)
    blocks = torch.cat([scales, torch.arange(32, dtype=torch.uint8).mul(8).expand(2**16, 32)], 1)
    weight = PackedRows("q8_0", blocks)
    assert_same_bits(decoded(weight, dtype), exact(weight, dtype))


@DTYPES
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 3e-39, 1e-37, 3e38, torch.inf, torch.nan])
def test_magnitudes_of_nf4_may_be_subnormal_or_infinite(magnitude, dtype):
    weight = packed_bytes.weight("nf4", 3, 256, scale=magnitude)
    assert_same_bits(decoded(weight, dtype), exact(weight, dtype))


@DTYPES
@pytest.mark.parametrize("block", NF4_BLOCKS)
def test_blocks_of_nf4_may_be_of_any_size_and_go_over_the_ends_of_rows(block, dtype):
    weight = packed_bytes.nf4(40, 352, torch.Generator().manual_seed(0), block=block)
    assert weight.block == block
    assert_same_bits(decoded(weight, dtype), exact(weight, dtype))


@DTYPES
def test_magnitudes_of_nf4_may_be_quantised(dtype):
    codes = torch.arange(64 * 64).mul(37).to(torch.uint8).view(64, 64)
    weight = NF4(codes, torch.arange(128).to(torch.uint8), torch.ones(1), torch.linspace(-1, 1, 256), torch.ones(1))
    assert_same_bits(decoded(weight, dtype), exact(weight, dtype))


@DTYPES
@pytest.mark.parametrize("scale", [1e-45, 3e-39, 2.0**-120, 2.0**-100, 1 / 3, 2.0**120, 3e38])
@pytest.mark.parametrize(("columns", "scales"), [(256, 1), (576, 5), (160, 2)])
def test_every_code_of_fp8_with_a_scale_for_a_row_or_a_block(columns, scales, scale, dtype):
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[(codes & 127) != 127].repeat(columns).view(-1, columns)
    each = torch.arange(1.0, 1.0 + len(codes) * scales).view(-1, scales).sqrt().reciprocal() * scale
    weight = FP8(packed_bytes.moved(codes, 5), each)
    assert weight.block in (columns, 128)
    assert_same_bits(decoded(weight, dtype), exact(weight, dtype))


@DTYPES
@pytest.mark.parametrize("encoding", PACKED)
def test_rows_are_looked_up_by_number(encoding, dtype):
    weight, ids = packed_bytes.weight(encoding, 50, 512), torch.tensor([49, 3, 3, 0, 49, 17])
    matrix = native_matrix.matrix_of(weight)
    assert_same_bits(native_matrix.look_up(matrix, ids, dtype), exact(weight, dtype)[ids])
    assert_same_bits(native_matrix.look_up(matrix, ids[::2].int(), dtype), exact(weight, dtype)[ids[::2]])
    assert native_matrix.look_up(matrix, ids[:0], dtype).shape == (0, 512)


@pytest.mark.parametrize("row", [-1, 50])
def test_a_row_that_is_not_there_is_an_error(row):
    matrix = native_matrix.matrix_of(packed_bytes.weight("q4_0", 50, 64))
    with pytest.raises(IndexError, match=f"rows 0 to 49, not .*{row}"):
        native_matrix.look_up(matrix, torch.tensor([0, row]), torch.float32)


@DTYPES
def test_rows_from_the_middle_on(dtype):
    weight = packed_bytes.weight("q6_k", 50, 512)
    found = native_matrix.decode(native_matrix.matrix_of(weight), 7, torch.empty(20, 512, dtype=dtype))
    assert_same_bits(found, exact(weight, dtype)[7:27])


def test_weights_that_the_library_does_not_read_are_left_to_others():
    assert native_matrix.matrix_of(PackedRows("q2_k", torch.zeros(2, 84, dtype=torch.uint8))) is None
    assert native_matrix.matrix_of(torch.zeros(2, 33)) is None
    assert native_matrix.matrix_of(FP8(torch.zeros(2, 96, dtype=torch.uint8), torch.ones(2, 3))) is None
    assert native_matrix.matrix_of(torch.zeros(2, 32, dtype=torch.float16)) is None
    assert native_matrix.matrix_of(torch.zeros(32, 2).T) is None
