"""The filters against transformers' logits processors; the draw against its own probabilities."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pixtral_cli.engine import sampler
from pixtral_cli.engine.sampler import Sampling
from pixtral_cli.errors import BrokenLogits


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


def test_the_smallest_top_p_that_a_number_can_be_keeps_the_likeliest(logits):
    sampling = Sampling(temperature=1.0, top_k=0, top_p=5e-324)
    assert sampler.choose(logits, sampling, [], [], torch.Generator()) == int(logits.argmax())


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
    chosen = torch.tensor([sampler.choose(logits, sampling, [0], [], random) for _ in range(n)])
    return torch.bincount(chosen, minlength=logits.numel()) / n


def test_draws_follow_the_tempered_and_filtered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -6.0])
    sampling = Sampling(temperature=2.0, top_k=4)
    expected = (logits[:4] / 2).softmax(-1)
    assert torch.allclose(draws(logits, sampling)[:4], expected, atol=0.03)
    assert draws(logits, sampling)[4] == 0


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0, top_k=0), Sampling(temperature=2, top_k=1)])
def test_temperature_0_and_top_k_1_take_the_likeliest(logits, sampling):
    assert sampler.choose(logits, sampling, [], [], torch.Generator()) == int(logits.argmax())


def test_the_same_seed_draws_the_same(logits):
    sampling = Sampling(temperature=1.0, top_k=0)
    pairs = [
        [sampler.choose(logits, sampling, [], [], random) for _ in range(30)]
        for random in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))
    ]
    assert pairs[0] == pairs[1] and len(set(pairs[0])) > 1


def test_a_bias_is_added_as_in_transformers(logits):
    bias = {3: 2.5, 199: -100.0}
    expected = theirs(SequenceBiasLogitsProcessor({(id,): value for id, value in bias.items()}), logits)
    assert torch.equal(sampler.add_bias(logits, bias), expected)


@pytest.mark.parametrize(("frequency", "presence"), [(0.0, 1.5), (0.7, 0.0), (-1.0, 0.25)])
def test_penalties_follow_the_formula_of_the_api_reference(logits, frequency, presence):
    answer = [3, 5, 5, 199, 5]
    expected = [
        mu - answer.count(j) * frequency - float(answer.count(j) > 0) * presence for j, mu in enumerate(logits.tolist())
    ]
    found = sampler.penalise_frequency(logits, answer, frequency, presence)
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


def test_only_the_answer_counts_for_frequency_and_presence_and_the_prompt_as_well_for_repetition():
    logits = torch.tensor([3.0, 2.0, 1.0])

    def chosen(prompt, answer, **penalty):
        return sampler.choose(logits, Sampling(**penalty), prompt, answer, torch.Generator())

    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert chosen([0], [], **penalty) == 0 and chosen([], [0], **penalty) == 1
    assert chosen([0], [], repetition_penalty=2.0) == chosen([], [0], repetition_penalty=2.0) == 1


def test_a_bias_of_100_forces_and_of_minus_100_bans_under_sampling_as_well(logits):
    worst, best = int(logits.argmin()), int(logits.argmax())
    assert draws(logits, Sampling(temperature=1.0, top_k=0, logit_bias={worst: 100.0}), 50)[worst] == 1
    assert draws(logits, Sampling(temperature=1.0, top_k=0, logit_bias={best: -100.0}), 200)[best] == 0


class Allows:
    """A constraint of these tokens."""

    def __init__(self, size, *tokens):
        self.allowed = torch.zeros(size, dtype=torch.bool)
        self.allowed[list(tokens)] = True

    def mask(self):
        return self.allowed


@pytest.mark.parametrize("size", [150, 200, 300])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=3.0, top_k=5), Sampling(logit_bias={0: 100.0})])
def test_only_what_a_constraint_allows_is_chosen_whatever_the_size_of_its_vocabulary(logits, size, sampling):
    allowed = [7, 80, 149]
    random = torch.Generator().manual_seed(0)
    chosen = {sampler.choose(logits, sampling, [], [], random, Allows(size, *allowed)) for _ in range(60)}
    assert chosen <= set(allowed) and (sampling.greedy or len(chosen) > 1)


@pytest.mark.parametrize("sampling", [Sampling(logit_bias={1: 1.0}), Sampling(temperature=1.0, top_k=0)])
@pytest.mark.parametrize("broken", [[float("nan"), 0.0, 1.0], [float("inf"), 0.0, 1.0], [-float("inf")] * 3])
def test_scores_that_are_no_numbers_are_told(broken, sampling):
    with pytest.raises(BrokenLogits, match="no usable scores"):
        sampler.choose(torch.tensor(broken), sampling, [], [], torch.Generator())
