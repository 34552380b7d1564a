"""What holds for every encoder and any weights: exactness, bounds, shapes, refusals."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from weights_cache import codecs
from weights_cache.errors import NotEncodable, WeightsError, WidthNotDivisible

PACKED = ["q8_0", "q4_0", "q4_k", "q6_k"]
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CODE_STEPS = {"q8_0": 127, "q4_0": 8, "q4_k": 15, "q6_k": 32}
REACH = 65504 * 8  # what every encoding can hold: q4_0's largest scale times its largest code
several = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def there_and_back(name, plain):
    codec = codecs.get(name)
    return codec.decode(codec.encode(plain))


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def float16s(random, count):
    """Any float16 that is a number and not 0, as the two bytes of each block: uint8 [count, 2]."""
    magnitudes = random.integers(1, 0x7C00, count, dtype=np.uint16)
    return (magnitudes | random.integers(0, 2, count, dtype=np.uint16) << 15).view(np.uint8).reshape(count, 2)


def q8_0_at_full_range(random, count):
    codes = random.integers(-127, 128, (count, 32), dtype=np.int8)
    codes[:, 5] = 127
    return np.concatenate([float16s(random, count), codes.view(np.uint8)], axis=1)


def q4_0_at_full_range(random, count):
    codes = random.integers(0, 256, (count, 16), dtype=np.uint8)
    codes[:, 3] &= 0xF0  # code 0, which is -8 times the scale
    return np.concatenate([float16s(random, count), codes], axis=1)


def q4_k_at_full_range(random, count):
    data = random.integers(0, 256, (count, 144), dtype=np.uint8)
    data[:, :2] = float16s(random, count)
    data[:, 1] &= 0x7F  # positive steps of one exponent, so that float32 holds the weights without rounding
    data[:, 3] = data[:, 1] & 0x7C | data[:, 3] & 0x03
    data[:, 4] |= 63  # some group's scale and some group's offset are the largest that there are
    data[:, 9] |= 63
    data[:, 16::32], data[:, 17::32] = 0x00, 0xFF  # every group has the lowest and the highest code
    return data


def q6_k_at_full_range(random, count):
    data = random.integers(0, 256, (count, 210), dtype=np.uint8)
    data[:, 208:] = float16s(random, count)
    data[:, 192 + 7] = 0x80  # the scale -128
    for half in (0, 64):
        data[:, half : half + 64 : 16] = 0  # every group has the code -32: low bits and upper bits
    data[:, 128:192:16] = 0
    return data


FULL_RANGE = {
    "q8_0": q8_0_at_full_range,
    "q4_0": q4_0_at_full_range,
    "q4_k": q4_k_at_full_range,
    "q6_k": q6_k_at_full_range,
}


@pytest.mark.parametrize("name", PACKED)
@several
@given(seed=seeds)
def test_weights_that_can_be_stored_exactly_come_back(name, seed):
    data = FULL_RANGE[name](np.random.default_rng(seed), 9)
    exact = torch.from_numpy(dequantize(data, GGMLQuantizationType[name.upper()]))
    again = there_and_back(name, exact)
    if name != "q4_k":
        assert torch.equal(again, exact)
    else:  # of two steps that give nearly the same weights it may take the other: once in some hundred blocks
        assert torch.all((again - exact).abs() <= exact.abs().amax(1, keepdim=True) * 2**-10)
        assert (again == exact).float().mean() > 0.9


@pytest.mark.parametrize("name", PACKED)
@several
@given(seed=seeds, exponent=st.floats(-35, 5))
def test_encoding_is_never_worse_than_storing_zeros_at_any_magnitude(name, seed, exponent):
    plain = (normal(seed, 3, 512) * 10**exponent).clamp(-REACH, REACH).double()
    left = there_and_back(name, plain).double() - plain
    size = codecs.get(name).encoding.block
    assert torch.all(left.view(-1, size).square().sum(1) <= plain.view(-1, size).square().sum(1) * (1 + 1e-6))


@pytest.mark.parametrize("name", PACKED)
@several
@given(seed=seeds, exponent=st.floats(-2, 5))
def test_the_error_of_a_block_is_within_a_step_of_its_codes(name, seed, exponent):
    """In the root mean square, of the block's largest weight over the codes that there are for it."""
    plain = (normal(seed, 3, 512) * 10**exponent).clamp(-REACH, REACH)
    size = codecs.get(name).encoding.block
    left = (there_and_back(name, plain) - plain).view(-1, size).square().mean(1).sqrt()
    assert torch.all(left <= plain.view(-1, size).abs().amax(1) * (2 if name == "q4_k" else 1) / CODE_STEPS[name])


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, 0.013, -1e-5])
def test_constant_weights_stay_constant(name, value):
    found = there_and_back(name, torch.full((2, 512), value))
    assert torch.all(found == found[0, 0])
    assert float(found[0, 0]) == pytest.approx(value, rel=4e-3, abs=2e-7)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("value", [1e9, -1e30, 3.4e38])
def test_weights_beyond_the_format_take_its_largest_values(name, value):
    plain = torch.cat([torch.full((1, 512), value), normal(0, 1, 512)])
    found = there_and_back(name, plain)
    assert torch.isfinite(found).all()
    assert torch.all(found[0] * value > 0) and found[0].abs().min() >= REACH * 0.9
    assert (found[1] - plain[1]).abs().max() < 1


@pytest.mark.parametrize("name", PACKED)
def test_a_block_with_one_weight_that_is_not_zero(name):
    for place in range(0, 256, 37):
        plain = torch.zeros(256)
        plain[place] = -0.75
        found = there_and_back(name, plain)
        assert float(found[place]) == pytest.approx(-0.75, rel=1e-3)
        assert torch.count_nonzero(found) == 1


@pytest.mark.parametrize("name", codecs.ENCODERS)
@several
@given(seed=seeds, shape=st.lists(st.integers(1, 3), max_size=3), blocks=st.integers(1, 3))
def test_shapes_are_kept_and_rows_have_the_bytes_announced(name, seed, shape, blocks):
    codec = codecs.get(name)
    columns = blocks * codec.encoding.block
    plain = normal(seed, *shape, columns)
    packed = codec.encode(plain)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape, codec.encoding.row_bytes(columns))
    assert codec.decode(packed).shape == plain.shape


@pytest.mark.parametrize("name", codecs.ENCODERS)
def test_any_layout_in_memory_and_any_float_give_the_same_bytes(name):
    codec = codecs.get(name)
    plain = normal(1, 6, 4, 512).bfloat16()
    expected = codec.encode(plain)
    assert torch.equal(codec.encode(plain.half() if name == "float16" else plain.float()), expected)
    assert torch.equal(codec.encode(plain.transpose(0, 1)), expected.transpose(0, 1))
    assert torch.equal(codec.encode(plain.permute(2, 1, 0).contiguous().permute(2, 1, 0)), expected)
    assert torch.equal(codec.encode(torch.nn.Parameter(plain)), expected)


@pytest.mark.parametrize("name", PACKED)
def test_the_bytes_of_a_row_do_not_depend_on_its_neighbours(name, monkeypatch):
    codec = codecs.get(name)
    plain = normal(2, 37, 1024) * 0.02
    expected = codec.encode(plain)
    assert torch.equal(torch.cat([codec.encode(row) for row in plain[:, None]]), expected)
    monkeypatch.setattr("weights_cache.codecs.codec.CHUNK_WEIGHTS", 5 * 1024)
    assert torch.equal(codec.encode(plain), expected)


@pytest.mark.parametrize("name", PACKED)
def test_the_weights_given_are_left_as_they_were(name):
    plain = normal(3, 4, 512)
    before = plain.clone()
    codecs.get(name).encode(plain)
    assert torch.equal(plain, before)


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_rounded_once_and_may_be_infinite(name):
    plain = torch.cat([normal(4, 100) * 1e5, torch.tensor([float("inf"), -float("inf"), float("nan"), 1e-45, -0.0])])
    torch.testing.assert_close(
        there_and_back(name, plain), plain.to(FLOATS[name]).float(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("name", codecs.ENCODERS)
def test_no_rows_encode_to_no_rows(name):
    codec = codecs.get(name)
    assert codec.encode(torch.empty(0, 512)).shape == (0, codec.encoding.row_bytes(512))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("columns", [1, 31, 300])
def test_a_row_that_is_no_whole_blocks_is_refused_with_both_numbers(name, columns):
    codec = codecs.get(name)
    assert not codec.encoding.fits(columns) and codec.encoding.fits(columns * codec.encoding.block)
    for refused in (lambda: codec.encode(torch.zeros(2, columns)), lambda: codec.encoding.row_bytes(columns)):
        with pytest.raises(WidthNotDivisible) as error:
            refused()
        assert isinstance(error.value, WeightsError)
        assert f"{columns} " in str(error.value) and str(codec.encoding.block) in str(error.value)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_wherever_they_are(name, bad):
    plain = torch.zeros(3, 512)
    plain[2, 501] = bad
    with pytest.raises(NotEncodable, match=name):
        codecs.get(name).encode(plain)


@pytest.mark.parametrize("name", sorted(set(codecs.NAMES) - set(codecs.ENCODERS)))
def test_an_encoding_without_an_encoder_says_so(name):
    codec = codecs.get(name)
    assert not codec.encodes
    with pytest.raises(NotEncodable, match=name):
        codec.encode(torch.zeros(codec.encoding.block))
