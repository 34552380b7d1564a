"""Promises of weights that stay packed, of every kind: oracles are gguf-py's decoder and bitsandbytes'."""

import gguf
import pytest
import torch

from pixtral_cli.model.kernels.nf4 import bitsandbytes, encode
from weights_cache import codecs, packed
from weights_cache.codecs import fp8
from weights_cache.codecs.packed_rows import PackedRows
from weights_cache.encodings import ENCODINGS
from weights_cache.packed import PackedWeight

SHAPE = (128, 512)
PACKED = [name for name in codecs.ENCODERS if ENCODINGS[name].packed]
KINDS = [*PACKED, "nf4", "nf4 twice", "fp8"]


def weight_of(kind: str) -> tuple[PackedWeight, torch.Tensor]:
    """A packed matrix, and what another program decodes it to."""
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    if kind in PACKED:
        rows = codecs.get(kind).encode(weights)
        decoded = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind.upper()])
        return PackedRows(kind, rows), torch.from_numpy(decoded)
    if kind == "fp8":
        weight = fp8.encode(weights)
        return weight, weight.codes.view(torch.float8_e4m3fn).float() * weight.scales
    functional = bitsandbytes().functional
    twice = kind == "nf4 twice"
    codes, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4", compress_statistics=twice)
    return encode(weights, twice), functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_weight_is_decoded_as_another_program_does(kind):
    weight, expected = weight_of(kind)
    for each in (weight, weight.to(torch.device("cpu"))):
        assert isinstance(each, PackedWeight)
        assert (each.encoding, each.shape) == (weight.encoding, SHAPE)
        assert torch.equal(each.decoded(), expected)
        assert torch.equal(each.decoded(torch.bfloat16), expected.bfloat16())
        assert torch.equal(packed.plain(each), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_its_parts_are_known_before_it_is_made_and_make_it_again(kind):
    weight, expected = weight_of(kind)
    tensors = weight.tensors()
    found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}
    assert found == packed.parts(weight.encoding, SHAPE, nested=kind == "nf4 twice")
    assert weight.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    first = tensors.pop(next(iter(tensors)))
    again = packed.from_parts(weight.encoding, SHAPE, first, tensors)
    assert again is not None and torch.equal(again.decoded(), expected)
