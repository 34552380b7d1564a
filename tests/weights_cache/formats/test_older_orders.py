"""The orders of older files, as the kernels' own packers make them, put into rows; every byte comes back."""

import pytest
import torch
from support import older_files

from pixtral_cli.model.kernels.nf4 import bitsandbytes, encode
from weights_cache.codecs.nf4 import NF4
from weights_cache.encodings import ENCODINGS
from weights_cache.formats import older_orders
from weights_cache.packed import PackedRows

SHAPES = {"q4_0": [(64, 32), (192, 512), (128, 2304)], "q4_k": [(64, 256), (192, 512), (128, 2304)]}
SHAPES["nf4"] = [(32, 64), (96, 320), (320, 192), (32, 2)]
CASES = [(encoding, shape) for encoding, shapes in SHAPES.items() for shape in shapes]


def weight_of(encoding, shape, double=False):
    """Blocks of any bytes at all; nf4 of random weights."""
    generator = torch.Generator().manual_seed(sum(shape))
    if encoding == "nf4":
        return encode(torch.randn(shape, generator=generator), double)
    nbytes = ENCODINGS[encoding].row_bytes(shape[1])
    return PackedRows(encoding, torch.randint(0, 256, (shape[0], nbytes), dtype=torch.uint8, generator=generator))


@pytest.mark.parametrize(("encoding", "shape"), CASES)
def test_what_older_files_hold_is_what_the_kernels_own_packers_made(encoding, shape):
    """Else the tests that write such files would show nothing."""
    weight = weight_of(encoding, shape)
    codes = older_files.ordered(weight)["codes"]
    if encoding == "nf4":
        if shape[1] % 64:
            pytest.skip("bitsandbytes packs whole blocks only")
        functional = bitsandbytes().functional
        _, state = functional.quantize_4bit(torch.ones(shape), blocksize=64, quant_type="nf4")
        expected, _ = functional._convert_weight_packed_for_cpu(weight.codes.view(-1, 1), state)
    elif torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("torch has another order on this processor")
    else:
        expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(older_files.codes_of(weight), 1)
    assert torch.equal(codes.flatten(), expected.flatten())


@pytest.mark.parametrize("chunk", [1, older_orders.CHUNK])
@pytest.mark.parametrize(("encoding", "shape"), CASES)
def test_every_byte_comes_back(encoding, shape, chunk, monkeypatch):
    monkeypatch.setattr(older_orders, "CHUNK", chunk)
    weight = weight_of(encoding, shape)
    parts = older_files.ordered(weight)
    assert parts["codes"].shape == older_orders.codes_shape(encoding, *shape)
    again = older_orders.in_rows(encoding, shape, parts.pop("codes"), parts)
    assert type(again) is type(weight) and again.encoding == encoding and again.shape == shape
    assert all(torch.equal(part, weight.tensors()[name]) for name, part in again.tensors().items())


def test_quantised_magnitudes_stay_as_they_are():
    weight = weight_of("nf4", (96, 320), double=True)
    parts = older_files.ordered(weight)
    again = older_orders.in_rows("nf4", weight.shape, parts.pop("codes"), parts)
    assert isinstance(again, NF4) and again.nested and torch.equal(again.decoded(), weight.decoded())


@pytest.mark.parametrize("encoding", SHAPES)
def test_parts_of_another_size_are_no_matrix(encoding):
    shape = SHAPES[encoding][1]
    parts = older_files.ordered(weight_of(encoding, shape))
    codes, (name, beside) = parts.pop("codes"), parts.popitem()
    for wrong in ({}, {name: beside[1:]}, {name: beside.short()}, {"other": beside}, {name: beside, "other": beside}):
        assert older_orders.in_rows(encoding, shape, codes, wrong) is None


@pytest.mark.parametrize(
    ("encoding", "shape"),
    [("q4_k", (96, 256)), ("q4_k", (64, 128)), ("q4_0", (64, 16)), ("q4_0", (0, 32)), ("q4_0", (64, 0)),
     ("nf4", (48, 64)), ("nf4", (32, 3)), ("q6_k", (64, 256))],
)  # fmt: skip
def test_a_matrix_that_cannot_lie_so_has_no_such_shape(encoding, shape):
    assert older_orders.codes_shape(encoding, *shape) is None
