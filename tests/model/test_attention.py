"""Attention by itself, against a dense softmax in float64: windows, grouped heads, sequences, pages, chunks, images."""

from itertools import pairwise

import pytest
import torch
from support.dense_attention import dense, same_image
from torch import Tensor

from pixtral_cli.model.attention import AttendPaged, Span, attend_within
from pixtral_cli.model.config import TextConfig
from pixtral_cli.model.kv_cache import PAGE, KVCache, pages_for

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
HEADS, KV_HEADS, DIM = 6, 2, 8
WINDOWS = (None, 1, 5, PAGE + 3)
LENGTH = 3 * PAGE + 5


def config(windows: tuple[int | None, ...] = WINDOWS, kv_heads: int = KV_HEADS) -> TextConfig:
    return TextConfig(
        vocab_size=32, hidden_size=48, intermediate_size=64, num_layers=len(windows), num_heads=HEADS,
        num_kv_heads=kv_heads, head_dim=DIM, norm_eps=1e-5, rope_theta=1e4, max_length=1024, sliding_windows=windows,
        tied_embeddings=False,
    )  # fmt: skip


def random_qkv(tokens: int, seed: int = 0, kv_heads: int = KV_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, heads, DIM, generator=generator) for heads in (HEADS, kv_heads, kv_heads))
    return 3 * q, k, v  # scores far apart


def seen_by(length: int, window: int | None) -> Tensor:
    """bool [L, L]: token i sees j up to itself, and no more than `window` tokens."""
    return torch.tensor([[j <= i and (window is None or i - j < window) for j in range(length)] for i in range(length)])


def expected(qkv: tuple[Tensor, Tensor, Tensor], window: int | None) -> Tensor:
    return dense(*qkv, seen_by(len(qkv[0]), window))


def attended(
    qkv, chunks: list[int], pages: list[int], layer: int, cache: KVCache, of: TextConfig, device=CPU
) -> Tensor:
    """One sequence, computed chunk after chunk through the cache."""
    found = []
    for begin, end in pairwise([0, *torch.tensor(chunks).cumsum(0).tolist()]):
        attend = AttendPaged(of, cache, [Span(pages, begin, end - begin)], device)
        found.append(attend(layer, *(x[begin:end].to(device) for x in qkv)).cpu())
    return torch.cat(found)


def new_cache(of: TextConfig, pages: int, device: torch.device = CPU) -> KVCache:
    """Full of what is not a number: whoever reads what nobody wrote shows it."""
    cache = KVCache(of, torch.float32, device, pages)
    cache._store.fill_(torch.nan)
    return cache


PAGES = {"in a row": [2, 3, 4, 5], "scattered": [6, 1, 7, 3]}
CHUNKS = {
    "whole": [LENGTH],
    "token by token": [1] * LENGTH,
    "over the pages' ends": [7, PAGE + 1, 2, LENGTH - PAGE - 10],
    "a prompt, then tokens": [LENGTH - 3, 1, 1, 1],
}


@pytest.mark.parametrize("layer", range(len(WINDOWS)), ids=[f"window {window}" for window in WINDOWS])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("pages", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_sequence_in_pages_attends_as_a_dense_softmax_says(device, pages, chunks, layer):
    qkv, of = random_qkv(LENGTH), config()
    found = attended(qkv, chunks, pages, layer, new_cache(of, 8, device), of, device)
    torch.testing.assert_close(found.double(), expected(qkv, WINDOWS[layer]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, HEADS])
def test_every_group_of_query_heads_reads_its_own_key_head(kv_heads):
    of, qkv = config((None,), kv_heads), random_qkv(LENGTH, kv_heads=kv_heads)
    for chunks in ([LENGTH], [1] * LENGTH):
        found = attended(qkv, chunks, PAGES["scattered"], 0, new_cache(of, 8), of)
        torch.testing.assert_close(found.double(), expected(qkv, None), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", range(len(WINDOWS)), ids=[f"window {window}" for window in WINDOWS])
def test_sequences_in_one_pass_see_themselves_only_wherever_they_stand(layer):
    """One decodes, one is at its beginning, one goes on in the middle of a page; padding comes last."""
    of = config()
    cache = new_cache(of, 12)
    pages = [[9, 2], [0, 1, 5], [7, 3, 8, 4]]
    whole = [random_qkv(length, seed) for seed, length in enumerate((PAGE + 4, 2 * PAGE + 6, LENGTH))]
    before = [len(whole[0][0]) - 1, 0, PAGE + 2]
    for qkv, of_one, count in zip(whole, pages, before, strict=True):
        if count:
            attended([x[:count] for x in qkv], [count], of_one, layer, cache, of)
    spans = [Span(of_one, count, len(qkv[0]) - count) for qkv, of_one, count in zip(whole, pages, before, strict=True)]
    parts = [[x[count:] for x in qkv] for qkv, count in zip(whole, before, strict=True)]
    padding = random_qkv(3, seed=9)
    flat = [torch.cat(each) for each in zip(*parts, padding, strict=True)]
    found = AttendPaged(of, cache, spans, CPU)(layer, *flat)
    wanted = [expected(qkv, WINDOWS[layer])[count:] for qkv, count in zip(whole, before, strict=True)]
    torch.testing.assert_close(found[:-3].double(), torch.cat(wanted), atol=1e-5, rtol=0)
    assert not found[-3:].any()


def test_layers_keep_their_keys_apart():
    of = config((None, None))
    cache, first, second = new_cache(of, 8), random_qkv(LENGTH, 1), random_qkv(LENGTH, 2)
    attend = AttendPaged(of, cache, [Span(PAGES["scattered"], 0, LENGTH - 1)], CPU)
    for layer, qkv in enumerate((first, second)):
        attend(layer, *(x[:-1] for x in qkv))
    attend = AttendPaged(of, cache, [Span(PAGES["scattered"], LENGTH - 1, 1)], CPU)
    for layer, qkv in enumerate((first, second)):
        found = attend(layer, *(x[-1:] for x in qkv))
        torch.testing.assert_close(found.double(), expected(qkv, None)[-1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE])
def test_pages_hold_their_tokens_and_no_page_more(tokens):
    assert (pages_for(tokens) - 1) * PAGE < tokens <= pages_for(tokens) * PAGE


@pytest.mark.parametrize("lengths", [[12], [1], [6, 1, 5], [4, 4, 4]], ids=str)
def test_patches_see_all_of_their_own_image_and_nothing_of_others(lengths):
    q, k, v = random_qkv(sum(lengths), kv_heads=HEADS)
    found = attend_within(lengths, 0, q, k, v)
    torch.testing.assert_close(found.double(), dense(q, k, v, same_image(lengths)), atol=1e-5, rtol=0)
