"""The filters against transformers' logits processors; the draw against its own probabilities."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pixtral_cli.engine import sampler
from pixtral_cli.engine.request import Sampling


@pytest.fixture(params=range(5))
def logits(request):
    return torch.randn(200, generator=torch.Generator().manual_seed(request.param)) * 3


def theirs(processor, logits, history=(0,)):
    return processor(torch.tensor([history]), logits.clone()[None])[0]


@pytest.mark.parametrize("k", [1, 5, 199, 200, 1000])
def test_top_k_as_transformers(logits, k):
    assert torch.equal(sampler.keep_top_k(logits, k), theirs(TopKLogitsWarper(k), logits))


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_as_transformers(logits, p):
    assert torch.equal(sampler.keep_top_p(logits, p), theirs(TopPLogitsWarper(p), logits))


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p_as_transformers(logits, p):
    assert torch.equal(sampler.keep_min_p(logits, p), theirs(MinPLogitsWarper(p), logits))


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.8])
def test_repetition_penalty_as_transformers(logits, penalty):
    history = [3, 5, 5, 199]
    expected = theirs(RepetitionPenaltyLogitsProcessor(penalty), logits, history)
    assert torch.equal(sampler.penalise_repetition(logits, history, penalty), expected)


def draws(logits, sampling, n=4000):
    random = torch.Generator().manual_seed(3)
    chosen = torch.tensor([sampler.choose(logits, sampling, [0], random) for _ in range(n)])
    return torch.bincount(chosen, minlength=logits.numel()) / n


def test_draws_follow_the_tempered_and_filtered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -6.0])
    sampling = Sampling(temperature=2.0, top_k=4)
    expected = (logits[:4] / 2).softmax(-1)
    assert torch.allclose(draws(logits, sampling)[:4], expected, atol=0.03)
    assert draws(logits, sampling)[4] == 0


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0, top_k=0), Sampling(temperature=2, top_k=1)])
def test_temperature_0_and_top_k_1_take_the_likeliest(logits, sampling):
    assert sampler.choose(logits, sampling, [], torch.Generator()) == int(logits.argmax())


def test_the_same_seed_draws_the_same(logits):
    sampling = Sampling(temperature=1.0, top_k=0)
    pairs = [
        [sampler.choose(logits, sampling, [], random) for _ in range(30)]
        for random in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))
    ]
    assert pairs[0] == pairs[1] and len(set(pairs[0])) > 1
