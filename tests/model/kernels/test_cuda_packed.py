"""The kernels for packed weights on a card: run by the CPU in place of a card, compiled without one, and on one.

The oracle is the codec's decode, multiplied in float64. Letters: N rows of x, C columns, R rows of the weight.
"""

import logging
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from support import emulated_card, packed_bytes

from pixtral_cli.model import card_bits
from pixtral_cli.model.kernels import card_layout, cuda_packed, nf4, nvrtc
from pixtral_cli.model.kernels.cuda_packed import CudaPackedKernel, Launch, launch_for
from pixtral_cli.model.kernels.nvrtc import CudaFailed
from pixtral_cli.model.kernels.reference import PackedEmbedding
from weights_cache import codecs
from weights_cache.codecs import fp8
from weights_cache.codecs.fp8 import FP8
from weights_cache.codecs.nf4 import NF4
from weights_cache.encodings import ENCODINGS
from weights_cache.packed import PackedRows

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ENCODED = tuple(card_bits.UNIT_BYTES)
IN_ROWS = tuple(card_layout.PACKINGS)
FACTORS = {"q4_0": [0], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208], "q8_0": [0]}
"""Where the float16 numbers of a block are."""
needs_compiler = pytest.mark.skipif(emulated_card.COMPILER is None, reason="no g++")


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def encoded(encoding, shape, double=False):
    weights = random(*shape, scale=0.05) + 0.01
    if encoding == "nf4":
        return nf4.encode(weights, double)
    if encoding == "fp8":
        return fp8.encode(weights)
    if encoding not in codecs.ENCODERS:
        return random_bytes(encoding, shape)
    return PackedRows(encoding, codecs.get(encoding).encode(weights))


def random_bytes(encoding, shape):
    """Any codes and scales, but for small float16 factors: quicker to make than to encode."""
    generator, kind = torch.Generator().manual_seed(0), ENCODINGS[encoding]
    if encoding == "nf4":
        codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, generator=generator)
        return NF4(codes, torch.rand(shape[0] * shape[1] // 64, generator=generator) + 0.1)
    if encoding == "fp8":
        return packed_bytes.fp8(*shape, generator)
    size = (shape[0], shape[1] // kind.block, kind.block_bytes)
    blocks = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    for at in FACTORS[encoding]:
        blocks[..., at + 1] = 6 + at % 3  # the upper byte: 2^-14 and on
    return PackedRows(encoding, blocks.flatten(1))


def assert_product(found, x, weight):
    """Within the rounding of a bfloat16 result, and what float32 sums may lose."""
    x, exact = x.double(), weight.decoded().double().to(x.device)
    wanted, size = x @ exact.T, x.abs().sum(1, keepdim=True) * exact.abs().max()
    assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5 * size).all()


def assert_same(weight, other):
    assert type(weight) is type(other) and weight.encoding == other.encoding and weight.shape == other.shape
    parts, others = weight.tensors(), other.tensors()
    assert parts.keys() == others.keys()
    for name, part in parts.items():
        assert torch.equal(part.cpu(), others[name].cpu()), name


@pytest.fixture
def emulated(monkeypatch):
    """A kernel's functions run on the CPU."""
    monkeypatch.setattr(nvrtc, "load", emulated_card.load)
    monkeypatch.setattr(nvrtc, "card", lambda device: emulated_card.CARD)
    for cached in (cuda_packed._compiled, cuda_packed._functions):
        cached.cache_clear()
    yield
    for cached in (cuda_packed._compiled, cuda_packed._functions):
        cached.cache_clear()


@needs_compiler
@pytest.mark.parametrize("encoding", ENCODED)
def test_few_rows_are_multiplied_straight_from_packed_memory(emulated, encoding):
    weight = encoded(encoding, (48, 1280))
    few = CudaPackedKernel(weight, CPU).products[1]
    for rows in (1, 2, 7, 8, 9, 16, 17):
        x = random(rows, 1280, seed=rows).bfloat16()
        assert_product(few(x), x, weight)


@needs_compiler
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("encoding", ["q4_k", "q6_k", "nf4"])
def test_rows_can_share_the_columns_of_the_tensor_cores_with_groups(emulated, monkeypatch, encoding, rows):
    monkeypatch.setattr(cuda_packed, "SLICES", {rows: (rows, 1), 1: (1, 1)})
    weight, x = encoded(encoding, (32, 512)), random(rows, 512).bfloat16()
    assert_product(CudaPackedKernel(weight, CPU).products[1](x), x, weight)


@needs_compiler
def test_a_row_has_the_same_product_whatever_is_beside_it(emulated):
    few = CudaPackedKernel(encoded("q4_k", (32, 512)), CPU).products[1]
    x = random(16, 512).bfloat16()
    together = few(x)
    assert torch.equal(few(x[3:11]), together[3:11])
    assert torch.equal(few(x[2:4]), together[2:4])


@needs_compiler
@pytest.mark.parametrize(
    "launch", [Launch(1, 3, 1), Launch(2, 2, 2), Launch(2, 2, 5, 1), Launch(1, 3, 4, 2), Launch(1, 3, 5, 1)], ids=str
)
@pytest.mark.parametrize("encoding", ["q4_k", "nf4"])
def test_however_it_is_launched_the_product_is_right(emulated, encoding, launch):
    weight = encoded(encoding, (112, 1280))
    kernel = CudaPackedKernel(weight, CPU)
    for most in (1, 8):
        kernel.use(most, launch)
    for rows in (1, 3):
        x = random(rows, 1280, seed=rows).bfloat16()
        assert_product(kernel.products[1](x), x, weight)


@needs_compiler
@pytest.mark.parametrize("encoding", ENCODED)
def test_rows_are_decoded_as_the_codec_decodes_them(emulated, encoding):
    weight = encoded(encoding, (80, 768))
    kernel, found = CudaPackedKernel(weight, CPU), torch.empty(48, 768, dtype=torch.bfloat16)
    kernel.decode(16, 64, found)
    assert torch.equal(found, weight.decoded(torch.bfloat16)[16:64])


@needs_compiler
@pytest.mark.parametrize("encoding", ENCODED)
def test_rows_are_looked_up_as_the_codec_decodes_them(emulated, encoding):
    weight, ids = encoded(encoding, (80, 768)), torch.tensor([79, 3, 3, 0, 40, 15, 16])
    kernel = CudaPackedKernel(weight, CPU)
    assert torch.equal(kernel.look_up(ids), weight.decoded(torch.bfloat16)[ids])
    assert kernel.look_up(ids[:0]).shape == (0, 768)


@needs_compiler
@pytest.mark.parametrize("room", [80, 32], ids=["all rows at a time", "in tiles of rows"])
def test_many_rows_are_multiplied_with_decoded_weights(emulated, monkeypatch, room):
    monkeypatch.setattr(card_bits, "BUFFER", room * 512 * 2)
    weight, x = encoded("q4_k", (80, 512)), random(70, 512).bfloat16()
    many = CudaPackedKernel(weight, CPU).products[cuda_packed.DECODED_FROM]
    wanted = x.float() @ weight.decoded(torch.bfloat16).float().T
    torch.testing.assert_close(many(x).float(), wanted, atol=1e-3, rtol=2**-7)


@needs_compiler
def test_extreme_codes_and_scales_are_exact(emulated):
    """All bits set and none, in every byte but those of the float16 factors."""
    for encoding, factors in FACTORS.items():
        kind = ENCODINGS[encoding]
        blocks = torch.zeros(16, 512 // kind.block, kind.block_bytes, dtype=torch.uint8)
        blocks[::2] = 255
        for at in factors:
            blocks[..., at : at + 2] = torch.tensor([0, 0x34], dtype=torch.uint8)  # 0.25
        weight, x = PackedRows(encoding, blocks.flatten(1)), random(8, 512).bfloat16()
        assert_product(CudaPackedKernel(weight, CPU).products[1](x), x, weight)


@needs_compiler
def test_every_code_of_fp8_and_every_scale_is_exact(emulated):
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[(codes & 127) != 127].repeat(256).view(-1, 256)[: 15 * 16]
    scales = torch.tensor([2.0**-120, 3e-39, 1 / 3, 2.0**110]).repeat(60, 1).flatten()[:, None]
    weight, found = FP8(codes, scales.expand(-1, 2)[:, :1]), torch.empty(240, 256, dtype=torch.bfloat16)
    kernel = CudaPackedKernel(weight, CPU)
    kernel.decode(0, 240, found)
    assert torch.equal(found, weight.decoded(torch.bfloat16))
    ordinary = FP8(codes, torch.full((240, 1), 0.25))
    x = random(8, 256).bfloat16()
    assert_product(CudaPackedKernel(ordinary, CPU).products[1](x), x, ordinary)


@pytest.mark.parametrize("encoding", IN_ROWS)
def test_putting_rows_in_order_loses_no_bit(encoding):
    generator = torch.Generator().manual_seed(0)
    size = (32, ENCODINGS[encoding].row_bytes(768))
    rows = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    layout = card_layout.PACKINGS[encoding]
    units = layout.pack(rows)
    assert units.shape == (2, 3, card_bits.UNIT_BYTES[encoding])
    assert torch.equal(layout.unpack(units), rows)


def in_blocks_of_128():
    codes, state = nf4.bitsandbytes().functional.quantize_4bit(random(128, 512), blocksize=128, quant_type="nf4")
    return NF4(codes.view(128, 256), state.absmax)


@needs_compiler
@pytest.mark.parametrize("form", [*ENCODED, "nf4, double", "nf4, blocks of 128", "fp8, blocks"])
def test_the_weight_comes_back_as_it_was(emulated, monkeypatch, form):
    name, *special = form.split(", ")
    if form == "fp8, blocks":
        weight = packed_bytes.fp8(128, 512, torch.Generator().manual_seed(0), scales=4)
    else:
        weight = in_blocks_of_128() if "blocks of 128" in special else encoded(name, (128, 512), double=bool(special))
    monkeypatch.setattr(card_layout, "AT_ONCE", 64 * 512)
    kernel = CudaPackedKernel(weight, CPU)
    assert_same(kernel.weight, weight)
    x = random(3, 512).bfloat16()
    assert_product(kernel.products[1](x), x, weight)


@needs_compiler
@pytest.mark.parametrize("encoding", ENCODED)
def test_plans_know_the_bytes_on_a_card(emulated, encoding):
    kernel = CudaPackedKernel(encoded(encoding, (64, 768)), CPU)
    assert kernel.nbytes * 8 == 64 * 768 * card_bits.bits_on_card(encoding, 64, 768)


def test_plans_count_other_shapes_as_they_are_in_a_file():
    assert card_bits.bits_on_card("q4_k", 100, 512) == 4.5
    assert card_bits.bits_on_card("q5_1", 128, 512) == 6
    assert card_bits.bits_on_card("bfloat16", 128, 512) == 16


@pytest.mark.parametrize("encoding", ENCODED)
def test_every_default_launch_fits_the_smallest_card(encoding):
    small = nvrtc.Card(sm=86, processors=20, shared_per_processor=102400, shared_per_block=101376)
    for columns in (256, 768, 1024, 4096, 5120, 14336, 32768):
        for most in cuda_packed.SLICES:
            launch = launch_for(encoding, 1024, columns, most, small)
            assert launch.shared(encoding, most) <= small.shared_per_block and 1 <= launch.warps <= 16, launch


def test_only_what_fits_is_taken(monkeypatch):
    monkeypatch.setattr(cuda_packed, "why_not", lambda encoding, device: None)
    fitting, cuda = encoded("q4_k", (64, 512)), torch.device("cuda", 0)
    takes = CudaPackedKernel.takes
    assert takes(fitting, torch.bfloat16, cuda)
    assert takes(encoded("nf4", (64, 512)), torch.bfloat16, cuda)
    assert takes(encoded("fp8", (64, 512)), torch.bfloat16, cuda)
    assert not takes(FP8(torch.zeros(64, 512, dtype=torch.uint8), torch.ones(64, 8)), torch.bfloat16, cuda)
    assert not takes(fitting, torch.bfloat16, CPU)
    assert not takes(fitting, torch.float32, cuda)
    assert not takes(random(64, 512).bfloat16(), torch.bfloat16, cuda)
    assert not takes(encoded("q4_k", (60, 512)), torch.bfloat16, cuda)
    assert not takes(encoded("q4_0", (64, 288)), torch.bfloat16, cuda)


def test_why_a_card_cannot_run_it_is_said_once(monkeypatch, caplog):
    def refuse(*_):
        raise CudaFailed("there is no libnvrtc beside torch")

    monkeypatch.setattr(nvrtc, "load", refuse)
    monkeypatch.setattr(nvrtc, "card", lambda device: emulated_card.CARD)
    for cached in (cuda_packed.why_not, cuda_packed._compiled, cuda_packed._functions):
        cached.cache_clear()
    weight = encoded("q4_k", (64, 512))
    with caplog.at_level(logging.WARNING, "pixtral_cli.model"):
        taken = [CudaPackedKernel.takes(weight, torch.bfloat16, torch.device("cuda", 0)) for _ in range(3)]
    assert taken == [False] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "Weights in q4_k are multiplied with slowly on cuda:0: there is no libnvrtc beside torch"
    ]
    cuda_packed.why_not.cache_clear()


@needs_compiler
@pytest.mark.parametrize("encoding", ENCODED)
def test_a_card_is_tried_before_it_is_relied_on(emulated, monkeypatch, encoding):
    cuda_packed.why_not.cache_clear()
    assert cuda_packed.why_not(encoding, CPU) is None
    cuda_packed.why_not.cache_clear()
    right = cuda_packed._units
    monkeypatch.setattr(cuda_packed, "_units", lambda weight, device: right(weight, device).roll(1, 0))
    assert cuda_packed.why_not(encoding, CPU) == "the kernels give wrong products"
    cuda_packed.why_not.cache_clear()


def source():
    return Path(cuda_packed.__file__).with_name("packed_matmul.cu").read_text()


def needs_nvrtc():
    try:
        nvrtc.version()
    except CudaFailed as error:
        if "there is no libnvrtc" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(("sm", "slices"), [(80, [8]), (90, list(cuda_packed.SLICES)), (120, [8])])
@pytest.mark.parametrize("encoding", ENCODED)
def test_it_compiles_without_a_card_and_registers_suffice(encoding, sm, slices):
    needs_nvrtc()
    for most in slices:
        options = cuda_packed.macros(encoding, launch_for(encoding, 5120, 5120, most, emulated_card.CARD), most)
        cubin, log = nvrtc._compile(source(), [*options, "--ptxas-options=-v"], sm)
        assert cubin.startswith(b"\x7fELF")
        spilled = [int(size) for size in re.findall(r"(\d+) bytes spill stores", log)]
        assert len(spilled) == 3 and max(spilled) <= 64, log  # some words, for the sake of another warp


def test_what_is_compiled_is_kept(tmp_path, monkeypatch):
    needs_nvrtc()
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path))
    made = nvrtc.compiled('extern "C" __global__ void f() {}', [], 90)
    monkeypatch.setattr(nvrtc, "_compile", None)
    assert nvrtc.compiled('extern "C" __global__ void f() {}', [], 90) == made
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".cubin"]


def test_a_cache_that_cannot_be_written_to_is_no_error(tmp_path, monkeypatch):
    needs_nvrtc()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "file"))
    assert nvrtc.compiled('extern "C" __global__ void f() {}', [], 90).startswith(b"\x7fELF")


def test_a_source_that_is_wrong_is_refused_with_the_compilers_words():
    needs_nvrtc()
    with pytest.raises(CudaFailed, match=r'sm_90.*identifier "nothing" is undefined'):
        nvrtc._compile("__global__ void f() { nothing(); }", [], 90)


def captured(product, x):
    """The product of `x`, replayed by a graph that was captured with another one."""
    fixed, graph, stream = torch.zeros_like(x), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        product(fixed)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = product(fixed)
    fixed.copy_(x)
    graph.replay()
    return y


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", ENCODED)
def test_a_card_multiplies_any_number_of_rows(encoding):
    for shape in ((112, 512), (768, 5120), (640, 14336)):
        weight = random_bytes(encoding, shape)
        kernel = CudaPackedKernel(weight, GPU)
        assert CudaPackedKernel.takes(weight, torch.bfloat16, GPU)
        assert_same(kernel.weight, weight)
        rounded = weight.decoded(torch.bfloat16).double().to(GPU)
        for rows in (1, 2, 7, 8, 9, 16, 17, 64, 130):
            x = random(rows, shape[1], seed=rows).bfloat16().to(GPU)
            few, many = (product(x) for product in kernel.products.values())
            assert_product(few, x, weight)
            wanted = x.double() @ rounded.T
            assert (many.double() - wanted).norm() <= 4e-3 * wanted.norm()


@pytest.mark.gpu
def test_products_can_be_captured_in_a_graph():
    kernel = CudaPackedKernel(random_bytes("q4_k", (768, 5120)), GPU)
    for rows in (1, 8, 16, 130):
        x = random(rows, 5120).bfloat16().to(GPU)
        for product in kernel.products.values():
            assert torch.equal(captured(product, x), product(x))


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", ENCODED)
def test_a_card_decodes_as_the_codec_does(encoding):
    weight = random_bytes(encoding, (640, 5120))
    found = torch.empty(624, 5120, dtype=torch.bfloat16, device=GPU)
    CudaPackedKernel(weight, GPU).decode(16, 640, found)
    assert torch.equal(found.cpu(), weight.decoded(torch.bfloat16)[16:])


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", ENCODED)
def test_a_card_multiplies_the_largest_matrix(encoding):
    weight = random_bytes(encoding, (64, 5120))
    rows = {name: part.repeat(448, *[1] * (part.ndim - 1)) for name, part in weight.tensors().items()}
    large = {"nf4": NF4, "fp8": FP8}.get(encoding, partial(PackedRows, encoding))(**rows)
    kernel, x = CudaPackedKernel(large, GPU), random(8, 5120).bfloat16().to(GPU)
    few, many = (product(x) for product in kernel.products.values())
    assert torch.equal(few, few[:, :64].repeat(1, 448))
    assert_product(few[:, :64], x, weight)
    assert (many.double() - few.double()).norm() <= 5e-3 * few.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("encoding", IN_ROWS)
def test_rows_of_a_table_are_looked_up_in_a_graph(encoding):
    weight = encoded(encoding, (64, 512))
    ids = torch.tensor([63, 3, 3, 0], dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        table, wanted = PackedEmbedding(weight, dtype, GPU), weight.decoded(dtype)[ids]
        assert torch.equal(captured(table, ids.to(GPU)).cpu(), wanted)
        assert_same(table.weight, weight)
