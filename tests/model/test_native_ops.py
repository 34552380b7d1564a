"""The small operations in C against their formulas in float64, on every set of instructions that the machine has."""

import math

import pytest
import torch
from support.dense_attention import dense
from support.native_paths import compiled, path, threads  # noqa: F401  fixtures
from torch import nn
from torch.nn.functional import silu

from pixtral_cli.model import fused, native_ops
from pixtral_cli.model.attention import AttendPaged, Span
from pixtral_cli.model.config import TextConfig
from pixtral_cli.model.kernels import native
from pixtral_cli.model.kv_cache import PAGE, KVCache, pages_for
from pixtral_cli.model.native_ops import PagesOf

pytestmark = compiled
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
WIDTHS = (2, 15, 16, 100, 2048)
EPSILON = 1e-5


def random(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def rounded_once(found, exact, dtype):
    """No further from the exact number than its nearest neighbours of that dtype."""
    step = {torch.float32: 2**-22, torch.bfloat16: 2**-8}[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=step, atol=1e-7)


@DTYPES
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_sums_are_those_of_torch_and_norms_are_rounded_once(path, threads, rows, width, dtype):  # noqa: F811
    x, delta, weight = random(rows, width, dtype=dtype), random(rows, width, seed=1, dtype=dtype), random(width, seed=2)
    weight, before = weight.to(dtype), x.clone()
    total, found = native_ops.add_norm(x, delta, weight, EPSILON)
    assert torch.equal(total, x + delta) and torch.equal(x, before)
    exact = total.double() / (total.double().square().mean(1, keepdim=True) + EPSILON).sqrt() * weight.double()
    rounded_once(found, exact, dtype)
    same, found = native_ops.add_norm(total, None, weight, EPSILON)
    assert same is total
    rounded_once(found, exact, dtype)


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 16, 8, 128), (3, 4, 4, 64), (70, 9, 3, 24), (1, 1, 1, 2)], ids=str)
def test_heads_are_rotated_in_place_and_nothing_beside_them(path, threads, sizes, dtype):  # noqa: F811
    tokens, heads, kv_heads, dim = sizes
    qkv = random(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype).unflatten(1, (-1, dim))
    q, k, _ = qkv.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.cat([random(tokens, dim // 2, seed=1)] * 2, dim=1)[:, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = qkv.double()[:, : heads + kv_heads].chunk(2, dim=-1)
    exact = torch.cat([first, second], -1) * cos.double() + torch.cat([-second, first], -1) * sin.double()
    left = qkv[:, heads + kv_heads :].clone()
    found = native_ops.rotate(q, k, cos, sin)
    assert [each.data_ptr() for each in found] == [q.data_ptr(), k.data_ptr()]
    step = {torch.float32: 2**-22, torch.bfloat16: 2**-8}[dtype]
    size = (first.square() + second.square()).sqrt().repeat(1, 1, 2)  # what cancels leaves the error of its size
    assert ((torch.cat(found, 1).double() - exact).abs() <= step * exact.abs() + 2**-22 * size).all()
    assert torch.equal(qkv[:, heads + kv_heads :], left)


@DTYPES
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_gates_are_rounded_once_wherever_their_rows_lie(path, threads, rows, width, dtype):  # noqa: F811
    both = random(rows, 2 * width + 3, dtype=dtype, scale=10)
    gate, up = both[:, :width], both[:, width : 2 * width]
    exact = gate.double() * gate.double().sigmoid() * up.double()
    step = {torch.float32: 2**-21, torch.bfloat16: 2**-8}[dtype]  # e^-x of a large x carries the error of its rounding
    torch.testing.assert_close(native_ops.silu_mul(gate, up).double(), exact, rtol=step, atol=1e-37)


def test_gates_that_are_no_common_numbers_are_those_of_torch(path):  # noqa: F811
    gate = torch.tensor(
        [[0.0, -0.0, 88, -88, 103, -103, 1000, -1000, 3e38, -3e38, math.inf, -math.inf, math.nan, 1e-40]]
    )
    found, wanted = native_ops.silu_mul(gate, torch.ones_like(gate)), silu(gate)
    torch.testing.assert_close(found, wanted, rtol=2**-21, atol=1e-37, equal_nan=True)
    found = native_ops.silu_mul(gate.bfloat16(), torch.ones_like(gate).bfloat16())
    torch.testing.assert_close(found, silu(gate.bfloat16()), rtol=2**-8, atol=1e-37, equal_nan=True)


@DTYPES
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(path, threads, dtype):  # noqa: F811
    x, weight = random(9, 333, dtype=dtype), random(333, dtype=dtype)
    together = [*native_ops.add_norm(x, x, weight, EPSILON), native_ops.silu_mul(x, x)]
    for row in range(9):
        one = x[row : row + 1]
        alone = [*native_ops.add_norm(one, one, weight, EPSILON), native_ops.silu_mul(one, one)]
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


@DTYPES
def test_keys_and_values_of_views_come_into_their_slots_and_no_others(threads, dtype):  # noqa: F811
    _, k, v = random(7, 12 * 24, dtype=dtype).unflatten(1, (-1, 24)).split([6, 3, 3], dim=1)
    keys, values = torch.zeros(2, 64, 3, 24, dtype=dtype)
    slots = torch.tensor([63, 0, 17, 16, 15, 40, 2])
    native_ops.write(keys, values, slots, k, v)
    wanted = torch.zeros(2, 64, 3, 24, dtype=dtype)
    wanted[0, slots], wanted[1, slots] = k, v
    assert torch.equal(torch.stack([keys, values]), wanted)


class Stored:
    """Keys and values of sequences on scattered pages, in a store that is otherwise full of what is not a number."""

    def __init__(self, lengths, kv_heads, dim, dtype, seed=0):
        self.lengths = lengths
        counts = [pages_for(length) for length in lengths]
        order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
        self.pages = [order[sum(counts[:n]) : sum(counts[: n + 1])] for n in range(len(counts))]
        self.keys, self.values = torch.full((2, len(order) * PAGE, kv_heads, dim), torch.nan, dtype=dtype)
        self.whole = []
        for n, (length, pages) in enumerate(zip(lengths, self.pages, strict=True)):
            k, v = random(2 * length, kv_heads, dim, seed=n + 1, dtype=dtype).split(length)
            slots = [pages[t // PAGE] * PAGE + t % PAGE for t in range(length)]
            self.keys[slots], self.values[slots] = k, v
            self.whole.append((k, v))

    def attend_one(self, q, window=None, rows=None):
        rows = range(len(q)) if rows is None else rows
        out = torch.full(q[list(rows)].shape, torch.nan, dtype=q.dtype)
        pages = PagesOf([(self.pages[n], self.lengths[n]) for n in rows])
        native_ops.attend_one(q[list(rows)], self.keys, self.values, out, pages, window)
        return out


def seen(length, tokens, window):
    query, key = torch.arange(length - tokens, length)[:, None], torch.arange(length)[None]
    return (key <= query) & (key > query - (window or length + 1))


@DTYPES
@pytest.mark.parametrize("window", [None, 1, 5, PAGE + 3, 100])
@pytest.mark.parametrize("sizes", [(16, 8, 128), (6, 2, 8), (4, 4, 64), (5, 1, 20), (7, 1, 2), (8, 1, 256)], ids=str)
def test_one_token_attends_as_a_dense_softmax_says(path, threads, sizes, window, dtype):  # noqa: F811
    heads, kv_heads, dim = sizes
    lengths = [1, PAGE - 1, PAGE, 64, 65, 333]
    stored = Stored(lengths, kv_heads, dim, dtype)
    q = random(len(lengths), heads, dim, dtype=dtype, scale=3)
    found = stored.attend_one(q, window)
    for n, length in enumerate(lengths):
        exact = dense(q[n : n + 1], *stored.whole[n], seen(length, 1, window))
        step = {torch.float32: 2e-5, torch.bfloat16: 2**-8}[dtype]
        torch.testing.assert_close(found[n : n + 1].double(), exact, rtol=step, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("window", [None, 70])
def test_one_token_has_the_same_bits_whoever_attends_beside_it(path, threads, window, dtype, monkeypatch):  # noqa: F811
    lengths = [1000, 3, 64, 200]
    stored, q = Stored(lengths, 2, 64, dtype), random(4, 6, 64, dtype=dtype)
    together = stored.attend_one(q, window)
    monkeypatch.setattr(native, "threads", lambda: 1)
    assert all(torch.equal(stored.attend_one(q, window, [n])[0], together[n]) for n in range(4))


BLOCKS = [(512, 0, None), (1, 40, None), (7, 0, None), (200, 333, None), (300, 100, 64), (150, 1000, 130), (130, 0, 1)]


def attend_block(stored, q, before, window):
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    pages = PagesOf([(stored.pages[0], before + len(q))])
    native_ops.attend_block(q, stored.keys, stored.values, out, pages, before, window)
    return out


@pytest.fixture
def blocks():
    if not native_ops.takes_blocks(torch.empty(1, 1, 2, dtype=torch.bfloat16)):
        pytest.skip("only with AVX512-BF16")


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("sizes", [(16, 8, 128), (6, 2, 8), (3, 3, 64), (5, 1, 20), (8, 1, 256), (7, 1, 2)], ids=str)
def test_many_tokens_attend_as_a_dense_softmax_says(threads, sizes, block):  # noqa: F811
    (heads, kv_heads, dim), (tokens, before, window) = sizes, block
    stored = Stored([before + tokens], kv_heads, dim, torch.bfloat16)
    q = random(tokens, heads + 2, dim, dtype=torch.bfloat16, scale=3)[:, :heads]  # rows lie apart
    exact = dense(q, *stored.whole[0], seen(before + tokens, tokens, window))
    torch.testing.assert_close(attend_block(stored, q, before, window).double(), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("window", [None, 100])
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(threads, window):  # noqa: F811
    stored, q = Stored([500], 2, 64, torch.bfloat16), random(500, 6, 64, dtype=torch.bfloat16)
    whole = attend_block(stored, q, 0, window)
    chunks = [attend_block(stored, part, 0 if n == 0 else 123, window) for n, part in enumerate(q.split([123, 377]))]
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 400])
@pytest.mark.parametrize("dim", [64, 80])
def test_patches_attend_to_all_of_theirs(threads, tokens, dim):  # noqa: F811
    q, k, v = random(tokens, 12, dim, dtype=torch.bfloat16).split(4, dim=1)
    found = native_ops.attend_block(q, k, v, out := torch.empty(q.shape, dtype=q.dtype), causal=False) or out
    exact = dense(q, k, v, torch.ones(tokens, tokens, dtype=torch.bool))
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-8)


def test_what_is_trained_or_of_two_dtypes_is_computed_by_torch():
    x = random(2, 8)
    assert native_ops.take(x, x) and not native_ops.take(x, x.bfloat16()) and not native_ops.take(x.double())
    assert not native_ops.take(x, nn.Parameter(x))
    with torch.inference_mode():
        assert native_ops.take(x, nn.Parameter(x))


@pytest.mark.parametrize(
    ("heads", "dim"), [(native_ops.MOST_HEADS + 1, 2), (1, native_ops.MOST_DIM + 2), (4000, 2)], ids=str
)
def test_more_heads_than_its_stack_has_room_for_are_left_to_torch(monkeypatch, heads, dim):
    config = TextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=heads, num_kv_heads=1, head_dim=dim,
        norm_eps=1e-5, rope_theta=1e4, max_length=64, sliding_windows=(None,), tied_embeddings=False,
    )  # fmt: skip
    for name in ("attend_one", "attend_block"):
        monkeypatch.setattr(native_ops, name, None)
    qkv = random(6, heads, dim), random(6, 1, dim, seed=1), random(6, 1, dim, seed=2)
    store, found = KVCache(config, torch.float32, torch.device("cpu"), pages=1), []
    for begin, end in [(0, 5), (5, 6)]:
        attend = AttendPaged(config, store, [Span([0], begin, end - begin)], torch.device("cpu"))
        found.append(attend(0, *(x[begin:end] for x in qkv)))
    torch.testing.assert_close(torch.cat(found).double(), dense(*qkv, seen(6, 6, None)), rtol=1e-5, atol=1e-5)


def test_without_the_library_torch_computes(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    x, norm = random(2, 8), nn.RMSNorm(8).requires_grad_(False)
    assert torch.equal(fused.add_norm(x, x, norm)[1], norm(x + x))
    assert torch.equal(fused.silu_mul(x), silu(x[:, :4]) * x[:, 4:])
