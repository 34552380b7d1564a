"""The order of torch's 4-bit kernel, against torch's own converter; the codes, against gguf-py."""

import gguf
import pytest
import torch

from pixtral_cli.model.kernels import int4 as layers
from weights_cache import codecs
from weights_cache.codecs.int4 import LAYOUTS, Int4
from weights_cache.encodings import ENCODINGS
from weights_cache.packed import from_parts, parts

SHAPES = [(64, 256), (192, 512), (128, 2304)]
TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q4_k": gguf.GGMLQuantizationType.Q4_K}
kernel = pytest.mark.skipif(not layers.supported(), reason="this processor has no such kernel")


def random_rows(encoding, rows, columns):
    """Any bytes at all."""
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randint(0, 256, (rows, ENCODINGS[encoding].row_bytes(columns)), dtype=torch.uint8, generator=generator)


def with_scales_of_one(encoding, rows):
    """The same codes in blocks whose weights gguf-py gives as code (q4_k) or code - 8 (q4_0)."""
    layout = LAYOUTS[encoding]
    blocks = rows.clone().view(-1, layout.encoding.block_bytes)
    one = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    blocks[:, :2] = one
    if encoding == "q4_k":  # offsets of no size; every scale 1
        blocks[:, 2:4] = 0
        blocks[:, 4:16] = torch.tensor([1] * 4 + [0] * 4 + [1] * 4, dtype=torch.uint8)
    return blocks.view(rows.shape)


@kernel
@pytest.mark.parametrize("encoding", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_lie_in_the_order_of_torchs_own_converter(encoding, shape):
    rows = random_rows(encoding, *shape)
    weights = gguf.quants.dequantize(with_scales_of_one(encoding, rows).numpy(), TYPES[encoding])
    codes = torch.from_numpy(weights).int() + (8 if encoding == "q4_0" else 0)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    assert torch.equal(Int4.from_rows(encoding, rows).codes.flatten(), expected.flatten())


@pytest.mark.parametrize("encoding", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_comes_back(encoding, shape):
    rows = random_rows(encoding, *shape)
    ordered = Int4.from_rows(encoding, rows)
    assert ordered.shape == shape and torch.equal(ordered.in_rows().rows, rows)
    tensors = ordered.tensors()
    assert {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()} == parts(
        encoding, shape, kernel_order=True
    )
    assert ordered.nbytes == sum(tensor.nbytes for tensor in tensors.values()) == rows.nbytes
    again = from_parts(encoding, shape, tensors.pop("codes"), tensors)
    assert isinstance(again, Int4) and torch.equal(again.in_rows().rows, rows)


@pytest.mark.parametrize("encoding", TYPES)
def test_rows_that_are_no_whole_tensor_of_their_own_are_taken_as_well(encoding):
    rows = random_rows(encoding, 128, 512)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), rows.flatten()])[1:].view(rows.shape)  # at an odd byte
    assert torch.equal(Int4.from_rows(encoding, shifted).in_rows().rows, rows)
    assert torch.equal(Int4.from_rows(encoding, rows[64:]).in_rows().rows, rows[64:])


@pytest.mark.parametrize("encoding", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_and_zeros_stand_for_the_weights_of_ggufs_own_decoder(encoding, shape):
    """Each rounded to bfloat16 once: by 2^-8 of its size at most."""
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.05 + 0.01
    rows = codecs.get(encoding).encode(weights)
    ordered = Int4.from_rows(encoding, rows)
    scales, zeros = ordered.scales_and_zeros().float().repeat_interleave(32, 0).transpose(0, 1).unbind(2)  # [R, C]
    codes = ordered.codes.transpose(1, 2)
    signed = torch.cat([codes & 0xF, codes >> 4], 1).flatten(0, 1).float() - 8
    exact = torch.from_numpy(gguf.quants.dequantize(rows.numpy(), TYPES[encoding]))
    most = 2**-8 * ((signed * scales).abs() + zeros.abs()) + 1e-7
    assert ((signed * scales + zeros - exact).abs() <= most).all()
    assert encoding == "q4_k" or not zeros.any()


@pytest.mark.parametrize(
    ("encoding", "rows", "fit"),
    [("q4_k", 64, True), ("q4_0", 5120, True), ("q4_k", 32, False), ("q4_k", 96, False), ("q6_k", 64, False)],
)
def test_only_whole_64_rows_of_q4_0_and_q4_k_fit(encoding, rows, fit):
    assert ENCODINGS[encoding].has_kernel_order(rows) == fit
