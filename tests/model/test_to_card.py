"""Tensors on their way to a card: every byte arrives, whatever its dtype and however long. A CPU stands in for it."""

import pytest
import torch

from pixtral_cli.model.to_card import LEAST, Reading, ToCard
from weights_cache import codecs
from weights_cache.codecs import fp8
from weights_cache.packed import PackedRows

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool)


def noise(*shape, dtype=torch.uint8):
    """Random bytes, seen as numbers of `dtype`: every pattern of bits can occur."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    *rows, columns = shape
    return torch.randint(256, (*rows, columns * dtype.itemsize), dtype=torch.uint8).view(dtype)


def same(one, other):
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_arrives_bit_for_bit(dtype):
    source = noise(7, 33, dtype=dtype)
    assert same(source, ToCard(CPU, piece=64).tensor(source))


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_tensors_around_the_size_of_a_piece_arrive_whole_and_in_order(nbytes, buffers):
    to_card = ToCard(CPU, piece=64, buffers=buffers)
    sources = [noise(nbytes), noise(5), noise(nbytes)]
    arrived = [to_card.tensor(source) for source in sources]
    assert all(map(same, sources, arrived))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("nbytes", [LEAST - 1, LEAST, LEAST + 1, 5 * LEAST + 7])
def test_several_threads_read_each_byte_once_into_its_place(threads, nbytes):
    reading, source = Reading(threads), noise(nbytes)
    target = torch.zeros(nbytes + 1, dtype=torch.uint8)
    reading(source, target[:nbytes])
    reading.end()
    assert torch.equal(target[:nbytes], source) and target[nbytes] == 0


def test_what_arrives_is_a_copy_and_contiguous():
    source = noise(8, 12, dtype=torch.float32)
    whole, turned = source.clone(), source.t()
    arrived = ToCard(CPU).tensor(turned)
    source.zero_()
    assert arrived.is_contiguous() and same(whole.t(), arrived)


def test_a_number_without_dimensions_arrives():
    assert ToCard(CPU).tensor(torch.tensor(3.5)).item() == 3.5


@pytest.mark.parametrize("encoding", ["q4_k", "q6_k", "q8_0", "fp8", "nf4"])
def test_packed_weights_arrive_with_all_their_parts(encoding):
    from pixtral_cli.model.kernels import nf4

    weights = torch.randn(64, 256)
    if encoding == "fp8":
        packed = fp8.encode(weights)
    elif encoding == "nf4":
        packed = nf4.encode(weights, double=True)
    else:
        packed = PackedRows(encoding, codecs.get(encoding).encode(weights))
    arrived = ToCard(CPU, piece=100).weight(packed)
    assert type(arrived) is type(packed) and arrived.encoding == encoding
    assert arrived.tensors().keys() == packed.tensors().keys()
    assert all(same(packed.tensors()[name], part) for name, part in arrived.tensors().items())


@pytest.mark.gpu
def test_a_card_gets_every_byte_while_pieces_follow_each_other_closely():
    card = torch.device("cuda")
    to_card = ToCard(card, piece=2**20)
    sources = [noise(3 * 2**20 + 7), noise(1000, 513, dtype=torch.bfloat16), noise(2**22)]
    arrived = [to_card.tensor(source) for source in sources]
    doubled = [each.clone() for each in arrived]  # used at once, on the stream that is current
    for source, there, copy in zip(sources, arrived, doubled, strict=True):
        assert there.device.type == "cuda" and same(source, there.cpu()) and same(source, copy.cpu())


@pytest.mark.gpu
def test_memory_that_was_just_given_back_is_not_overwritten_too_early():
    card = torch.device("cuda")
    to_card, size = ToCard(card, piece=2**20), 2**24
    sums = []
    sources = [torch.full((size,), value, dtype=torch.float32) for value in range(8)]
    for source in sources:
        there = to_card.tensor(source)
        sums.append(there.double().sum())  # still running when the next tensor takes the same memory
        del there
    assert [int(total) for total in sums] == [value * size for value in range(8)]
