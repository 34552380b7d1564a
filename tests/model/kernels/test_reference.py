"""The reference kernel and packed embeddings, against gguf-py's decoders."""

import gguf
import pytest
import torch

from pixtral_cli.model.kernels import cpu_tiles, native, reference
from pixtral_cli.model.kernels.reference import PackedEmbedding, ReferenceKernel
from weights_cache import codecs
from weights_cache.codecs import fp8
from weights_cache.codecs.fp8 import FP8
from weights_cache.packed import PackedRows

CPU = torch.device("cpu")
PACKED = [*sorted(set(codecs.ENCODERS) - {"float32", "float16", "bfloat16"}), "fp8", "fp8 in blocks"]
SHAPE = (50, 512)
with_library_and_without = pytest.mark.parametrize("instructions", ["portable", native.OFF], indirect=True)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_and_exact(encoding):
    if "fp8" in encoding:
        weight = fp8.encode(random(*SHAPE) * 0.05 + 0.01)
        if "blocks" in encoding:  # of which the library reads none
            weight = FP8(weight.codes, weight.scales * torch.arange(1.0, 17))
        scales = weight.scales.repeat_interleave(SHAPE[1] // weight.scales.shape[1], 1)
        return weight, weight.codes.view(torch.float8_e4m3fn).float() * scales
    packed = codecs.get(encoding).encode(random(*SHAPE) * 0.05 + 0.01)
    kind = gguf.GGMLQuantizationType[encoding.upper()]
    return PackedRows(encoding, packed), torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind))


@with_library_and_without
@pytest.mark.parametrize("tile", [1, 7 * 512, 2**22], ids=["a row", "seven rows", "all rows"])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 64])
@pytest.mark.parametrize("encoding", PACKED)
def test_products_are_those_of_the_weights_that_gguf_py_decodes(encoding, rows, tile, instructions, monkeypatch):
    for module in (reference, cpu_tiles):
        monkeypatch.setattr(module, "TILE", tile)
    weight, exact = packed_and_exact(encoding)
    x = random(rows, SHAPE[1], seed=1)
    found = ReferenceKernel(weight, CPU).products[1](x)
    torch.testing.assert_close(found.double(), x.double() @ exact.double().T, atol=2e-5, rtol=0)


@with_library_and_without
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("encoding", PACKED)
def test_rows_are_looked_up_as_gguf_py_decodes_them(encoding, dtype, instructions):
    weight, exact = packed_and_exact(encoding)
    ids = torch.tensor([49, 3, 3, 0, 49, 17])
    found = PackedEmbedding(weight, dtype, CPU)(ids)
    assert found.dtype == dtype and torch.equal(found, exact[ids].to(dtype))


class Doubled:
    """A made-up packed weight that no codec knows: what it decodes to is all that the reference needs."""

    encoding, shape = "doubled", (3, 4)

    def to(self, device):
        return self

    def decoded(self, dtype=torch.float32):
        return 2 * torch.arange(12.0).view(3, 4).to(dtype)


def test_any_packed_weight_can_be_multiplied_with():
    assert ReferenceKernel.takes(Doubled(), torch.float32, CPU)
    found = ReferenceKernel(Doubled(), CPU).products[1](torch.ones(2, 4))
    assert torch.equal(found, torch.tensor([[12.0, 44.0, 76.0]] * 2))
