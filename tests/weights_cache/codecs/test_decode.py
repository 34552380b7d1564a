"""Every encoding's decoder against gguf-py, bit for bit, and the forms in which bytes may come."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from weights_cache import codecs
from weights_cache.errors import UnknownEncoding, WeightsError, WidthNotDivisible

GGUF_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SPECIAL = (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x7C01, 0x7E00)  # 0, subnormal, 1, inf, NaN
SCALES = {"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}
SCALES |= dict.fromkeys(("q8_0", "q4_0", "q5_0", "iq4_nl", "iq4_xs"), (0,)) | dict.fromkeys(("q4_1", "q5_1"), (0, 2))


def gguf_type(name):
    return GGMLQuantizationType[GGUF_NAMES.get(name, name.upper())]


def random_blocks(name, count, seed=0):
    block_bytes = GGML_QUANT_SIZES[gguf_type(name)][1]
    return np.random.default_rng(seed).integers(0, 256, (count, block_bytes), dtype=np.uint8)


def assert_decodes_as_gguf_does(name, data):
    with np.errstate(all="ignore"):
        expected = dequantize(data, gguf_type(name))
    found = codecs.get(name).decode(torch.from_numpy(data)).numpy()
    assert found.shape == expected.shape and found.dtype == np.float32
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def test_the_encodings_of_common_files_are_all_there():
    blocks = "q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs".split()
    assert set(codecs.NAMES) == {"float32", "float16", "bfloat16", *blocks}
    assert set(codecs.ENCODERS) == {"float32", "float16", "bfloat16", "q8_0", "q4_0", "q4_k", "q6_k"}


@pytest.mark.parametrize("name", codecs.NAMES)
def test_blocks_have_the_sizes_of_the_format(name):
    codec = codecs.get(name)
    assert (codec.name, (codec.encoding.block, codec.encoding.block_bytes)) == (name, GGML_QUANT_SIZES[gguf_type(name)])


@pytest.mark.parametrize("name", codecs.NAMES)
def test_random_bytes_decode_bit_for_bit_as_in_gguf_py(name):
    assert_decodes_as_gguf_does(name, random_blocks(name, 600))


@pytest.mark.parametrize("name", SCALES)
def test_every_kind_of_float16_scale_decodes_as_in_gguf_py(name):
    """Subnormal, infinite, negative zero, not a number, and each 61st of the 65536, in every place for a scale."""
    kinds = np.array(SPECIAL, dtype=np.uint16)
    scales = np.concatenate([kinds, kinds | 0x8000, np.arange(0, 2**16, 61, dtype=np.uint16)])
    data = random_blocks(name, len(scales), seed=1)
    for index, at in enumerate(SCALES[name]):
        data[:, at : at + 2] = np.roll(scales, 977 * index).view(np.uint8).reshape(-1, 2)
    assert_decodes_as_gguf_does(name, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", codecs.NAMES)
def test_decoding_into_memory_that_is_there_gives_the_same_weights_in_it(name, dtype):
    codec = codecs.get(name)
    data = torch.from_numpy(np.tile(random_blocks(name, 40, seed=3), (1, 2)))
    expected = codec.decode(data, dtype)
    memory = torch.full((42, expected.shape[1]), 7.0, dtype=dtype)
    found = codec.decode(data, out=memory[1:41])
    assert found.data_ptr() == memory[1].data_ptr()
    torch.testing.assert_close(memory[1:41], expected, rtol=0, atol=0, equal_nan=True)
    assert (memory[[0, 41]] == 7).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_16_bit_float_decodes_as_in_gguf_py(name):
    assert_decodes_as_gguf_does(name, np.arange(2**16, dtype=np.uint16).view(np.uint8).reshape(64, -1))


def test_the_worked_examples_of_the_docstrings_are_true():
    q4_0 = torch.tensor([0x00, 0x38, 0x2F] + [0] * 15, dtype=torch.uint8)
    assert codecs.get("q4_0").decode(q4_0)[[0, 16]].tolist() == [3.5, -3.0]
    q4_k = torch.zeros(144, dtype=torch.uint8)
    q4_k[:4] = torch.tensor([0.5, 0.25]).half().view(torch.uint8)
    q4_k[[4, 8, 12, 16, 80]] = torch.tensor([0x83, 0x04, 0x21, 0x07, 0x01], dtype=torch.uint8)
    assert codecs.get("q4_k").decode(q4_k)[[0, 128]].tolist() == [9.5, 0.5 * 33 - 0.25 * 2]
    iq4_nl = torch.tensor([0x00, 0x38, 0x80] + [0] * 15, dtype=torch.uint8)
    assert codecs.get("iq4_nl").decode(iq4_nl)[[0, 16]].tolist() == [-63.5, 0.5]
    assert codecs.get("bfloat16").decode(torch.tensor([0x80, 0x3F], dtype=torch.uint8)).tolist() == [1.0]
    assert codecs.get("q4_k").encoding.row_bytes(5120) == 2880


@pytest.mark.parametrize("name", codecs.NAMES)
def test_a_narrower_dtype_rounds_the_exact_weights_once(name):
    data = torch.from_numpy(random_blocks(name, 40, seed=2))
    codec = codecs.get(name)
    for dtype in (torch.bfloat16, torch.float16):
        found = codec.decode(data, dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found, codec.decode(data).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", codecs.NAMES)
def test_bytes_may_come_in_any_shape_and_from_any_place_in_memory(name):
    codec = codecs.get(name)
    data = torch.from_numpy(random_blocks(name, 12, seed=3)).view(3, 2, 2 * codec.encoding.block_bytes)
    expected = codec.decode(data)
    assert expected.shape == (3, 2, 2 * codec.encoding.block)
    odd = torch.cat([torch.zeros(1, dtype=torch.uint8), data.flatten()])[1:].view(data.shape)
    apart = torch.stack([data, data], dim=-1)[..., 0]
    for same in (odd, apart):
        torch.testing.assert_close(codec.decode(same), expected, rtol=0, atol=0, equal_nan=True)
    turned = codec.decode(data.transpose(0, 1))
    torch.testing.assert_close(turned, expected.transpose(0, 1), rtol=0, atol=0, equal_nan=True)


def test_no_rows_decode_to_no_rows():
    assert codecs.get("q6_k").decode(torch.empty(0, 210, dtype=torch.uint8)).shape == (0, 256)


def test_chunks_leave_no_seams(monkeypatch):
    data = torch.from_numpy(random_blocks("q5_k", 100, seed=4))
    whole = codecs.get("q5_k").decode(data)
    monkeypatch.setattr("weights_cache.codecs.codec.CHUNK_WEIGHTS", 7 * 256)
    torch.testing.assert_close(codecs.get("q5_k").decode(data), whole, rtol=0, atol=0, equal_nan=True)


def test_floats_are_looked_at_in_place():
    data = torch.zeros(4, 16, dtype=torch.uint8)
    assert codecs.get("float32").decode(data).data_ptr() == data.data_ptr()


@pytest.mark.parametrize("name", [name for name in codecs.NAMES if codecs.get(name).encoding.block_bytes > 2])
def test_bytes_that_are_no_whole_blocks_are_refused_with_both_numbers(name):
    codec = codecs.get(name)
    with pytest.raises(WidthNotDivisible) as error:
        codec.decode(torch.zeros(2, codec.encoding.block_bytes + 1, dtype=torch.uint8))
    assert str(codec.encoding.block_bytes + 1) in str(error.value) and str(codec.encoding.block_bytes) in str(
        error.value
    )


def test_an_unknown_encoding_is_refused_with_the_known_ones():
    with pytest.raises(UnknownEncoding) as error:
        codecs.get("q7_x")
    assert isinstance(error.value, WeightsError)
    assert "q7_x" in str(error.value) and "iq4_xs" in error.value.hint
