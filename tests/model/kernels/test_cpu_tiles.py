"""Products of many rows with weights decoded tile by tile, on every path of instructions of this machine.

The oracle is the codec's decode, multiplied in float64. Letters: N rows of x, R rows of the weight, C columns.
"""

import pytest
import torch
from support import packed_bytes
from support.packed_bytes import BLOCKS, PACKED

from pixtral_cli.model.kernels import cpu_tiles, native_matrix

ENCODINGS = (*PACKED, "bfloat16", "float32")
pytestmark = pytest.mark.usefixtures("instructions")
multiplies = pytest.mark.parametrize("instructions", ["avx512bf16"], indirect=True)
"""With these the library multiplies; with others torch does, whose sums depend on the number of rows."""


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(weight):
    return (weight if isinstance(weight, torch.Tensor) else weight.decoded()).double()


def assert_product(found, x, weight):
    """Within one rounding of each weight and of the result in bfloat16, and what float32 sums may lose."""
    weight, x = exact(weight), x.double()
    wanted, size = x @ weight.T, x.abs() @ weight.abs().T
    rounding = (2**-9, 2**-8) if found.dtype == torch.bfloat16 else (0.0, 0.0)
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= rounding[0] * size + rounding[1] * wanted.abs() + 1e-5 * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (63, 512), (64, 1280), (130, 2304)])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_number_of_rows_is_multiplied(encoding, rows, columns, dtype):
    weight = packed_bytes.weight(encoding, rows, columns)
    matrix = native_matrix.matrix_of(weight)
    for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 12, 65):
        x = random(tokens, columns, seed=tokens).to(dtype)
        assert_product(cpu_tiles.multiply(matrix, x), x, weight)


@multiplies
@pytest.mark.parametrize("encoding", PACKED)
def test_in_bfloat16_each_weight_is_rounded_once(encoding):
    """One row of x for each column, with a single 1: the products are the weights."""
    weight = packed_bytes.weight(encoding, 70, 1536)
    found = cpu_tiles.multiply(native_matrix.matrix_of(weight), torch.eye(1536, dtype=torch.bfloat16))
    assert torch.equal(found.T, exact(weight).bfloat16())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_of_one_block_at_any_address(encoding):
    columns = BLOCKS.get(encoding, 32)
    weight, x = packed_bytes.weight(encoding, 17, columns, at=3), random(9, columns).bfloat16()
    assert_product(cpu_tiles.multiply(native_matrix.matrix_of(weight), x), x, weight)


@multiplies
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(encoding):
    matrix = native_matrix.matrix_of(packed_bytes.weight(encoding, 100, 1280))
    x = random(1200, 1280).bfloat16()
    together = cpu_tiles.multiply(matrix, x)
    for first, end in ((0, 1), (3, 11), (599, 606), (1199, 1200)):
        assert torch.equal(cpu_tiles.multiply(matrix, x[first:end]), together[first:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_x_and_the_result_may_be_columns_of_wider_matrices(dtype):
    weight = packed_bytes.weight("q4_k", 70, 512)
    wide, out = random(20, 1000).to(dtype), torch.full((20, 100), 7.0, dtype=dtype)
    for x in (wide[:, 100:612], wide[:, 100:612].T.contiguous().T):
        found = cpu_tiles.multiply(native_matrix.matrix_of(weight), x, out[:, 10:80])
        assert_product(found, x, weight)
        assert out[:, :10].eq(7).all() and out[:, 80:].eq(7).all() and torch.equal(out[:, 10:80], found)


def test_a_small_tile_for_torch_gives_the_same(monkeypatch):
    weight, x = packed_bytes.weight("q6_k", 70, 512), random(9, 512)
    monkeypatch.setattr(cpu_tiles, "TILE", 7 * 512)
    assert_product(cpu_tiles.multiply(native_matrix.matrix_of(weight), x), x, weight)
