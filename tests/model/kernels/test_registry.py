"""Every kernel of the registry and every number of rows, against the codec's decode; and what adding a kernel takes."""

from types import SimpleNamespace

import pytest
import torch
from support import builders

from pixtral_cli.encoding_choices import find
from pixtral_cli.model import kernels
from pixtral_cli.model.families import read_config
from pixtral_cli.model.kernels import KernelLinear, nf4
from pixtral_cli.model.kernels.reference import ReferenceKernel
from pixtral_cli.model.load import load
from pixtral_cli.model.placement import place
from weights_cache import checkpoint, codecs
from weights_cache.codecs import fp8
from weights_cache.packed import PackedRows

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
ROWS = (0, 1, 2, 8, 9, 47, 48, 63, 64, 130)
SHAPES = {"whole tiles": (128, 512), "rows that few kernels take": (50, 256)}
ENCODED = (*codecs.ENCODERS, "nf4", "fp8")


def random(*shape, seed=0, scale=0.05):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def encoded(encoding, shape):
    weights = random(*shape) + 0.01
    if encoding in ("nf4", "fp8"):
        return (nf4 if encoding == "nf4" else fp8).encode(weights)
    return PackedRows(encoding, codecs.get(encoding).encode(weights))


def kernels_for(weight, dtype, device=CPU):
    return [kernel for kernel in kernels.KERNELS if kernel.takes(weight, dtype, device)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_every_kernel_multiplies_any_number_of_rows_as_the_decoded_weight_does(device, encoding, shape, dtype):
    weight = encoded(encoding, shape)
    exact, taking = weight.decoded(), kernels_for(weight, dtype, device)
    assert ReferenceKernel in taking and kernels.choose(weight, dtype, device) is taking[0]
    for kernel in taking:
        layer = KernelLinear(kernel(weight, device))
        for rows in ROWS:
            x = random(rows, shape[1], seed=rows, scale=1).to(dtype)
            found, wanted = layer(x.to(device)).cpu(), x.float() @ exact.T
            assert found.dtype == dtype and found.shape == wanted.shape, (kernel, rows)
            assert (found.float() - wanted).norm() <= 1e-2 * wanted.norm(), (kernel, rows)


@pytest.mark.parametrize("encoding", ENCODED)
def test_a_kernel_loses_no_bit_of_its_weight(encoding):
    weight = encoded(encoding, (128, 512))
    for kernel in kernels_for(weight, torch.bfloat16):
        assert torch.equal(kernel(weight, CPU).weight.decoded(), weight.decoded()), kernel


@pytest.mark.parametrize("first", [64, 128], ids=["q4_0 or q4_k", "and not for those"])
def test_a_weight_in_the_order_of_a_kernel_is_taken_by_the_reference_as_well(first):
    weight = encoded("q4_k", (first, 512))
    x = random(3, 512, seed=1, scale=1).bfloat16()
    for kernel in kernels_for(weight, torch.bfloat16):
        ordered = kernel(weight, CPU).weight
        found = KernelLinear(ReferenceKernel(ordered, CPU))(x)
        assert torch.equal(found, KernelLinear(ReferenceKernel(weight, CPU))(x)), kernel


def test_plain_tensors_are_left_to_torch_where_no_kernel_takes_them():
    assert kernels.choose(random(64, 64).half(), torch.float16, CPU) is None
    assert kernels.choose(random(64, 64), torch.bfloat16, CPU) is None


@pytest.mark.parametrize(("rows", "used"), [(1, "few"), (7, "few"), (8, "some"), (99, "some"), (100, "many")])
def test_the_product_is_that_of_the_most_rows_that_are_there(rows, used):
    products = {8: lambda x: x + 8, 1: lambda x: x + 1, 100: lambda x: x + 100}
    layer = KernelLinear(SimpleNamespace(weight=torch.ones(4, 4), products=products))
    added = {"few": 1, "some": 8, "many": 100}[used]
    assert torch.equal(layer(torch.zeros(rows, 4)), torch.full((rows, 4), float(added)))


def test_a_bias_is_added_whatever_the_product():
    layer = KernelLinear(SimpleNamespace(weight=torch.ones(4, 4), products={1: torch.zeros_like}))
    assert layer(torch.ones(2, 4)).eq(0).all()
    layer.bias = torch.nn.Parameter(torch.arange(4.0), requires_grad=False)
    assert torch.equal(layer(torch.ones(2, 4)), torch.arange(4.0).expand(2, 4))


class Exact:
    """A made-up kernel: q6_k and bfloat16 matrices, decoded once for all."""

    def __init__(self, weight, device):
        self.weight = weight
        self.rows = []
        dense = weight if isinstance(weight, torch.Tensor) else weight.decoded(torch.bfloat16)
        self.products = {1: lambda x: self.product(x, dense, "few"), 4: lambda x: self.product(x, dense, "many")}

    @classmethod
    def takes(cls, weight, dtype, device):
        encoding = "bfloat16" if isinstance(weight, torch.Tensor) else weight.encoding
        return encoding in ("bfloat16", "q6_k") and dtype == torch.bfloat16

    def product(self, x, dense, used):
        self.rows.append((len(x), used))
        return x @ dense.T


@pytest.mark.parametrize("encoding", ["q6_k", "bfloat16"])
def test_a_new_kernel_needs_its_class_and_its_line_in_the_registry(tmp_path, monkeypatch, encoding):
    builders.mistral(tmp_path, hidden_size=256, intermediate_size=512)
    opened = checkpoint.open(tmp_path)

    def loaded():
        placement = place(opened.tensors, find(encoding))
        return load(opened, read_config(opened.config), placement, CPU)

    before = loaded().language_model.layers[1].mlp.up_proj
    monkeypatch.setattr(kernels, "KERNELS", [Exact, *kernels.KERNELS])
    layer = loaded().language_model.layers[1].mlp.up_proj
    assert isinstance(layer.kernel, Exact)
    for rows in (1, 4):
        x = random(rows, 256, scale=1).bfloat16()
        assert (layer(x).float() - before(x).float()).norm() < 1e-2 * before(x).float().norm()
    assert layer.kernel.rows == [(1, "few"), (4, "many")]
