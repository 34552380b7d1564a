"""The filters against transformers' logits processors; the draw against its own probabilities."""

import pytest
import torch
from support.engines import choose
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pixtral_cli.engine import sampler
from pixtral_cli.engine.request import Sampling
from pixtral_cli.engine.sampler import Row
from pixtral_cli.errors import BrokenLogits, RequestError


@pytest.fixture(params=range(5))
def logits(request):
    return torch.randn(200, generator=torch.Generator().manual_seed(request.param)) * 3


def theirs(processor, logits, history=(0,)):
    return processor(torch.tensor([history]), logits.clone()[None])[0]


@pytest.mark.parametrize("k", [1, 5, 199, 200, 1000])
def test_top_k_as_transformers(logits, k):
    assert torch.equal(sampler.keep_top_k(logits[None], [k])[0], theirs(TopKLogitsWarper(k), logits))


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_as_transformers(logits, p):
    assert torch.equal(sampler.keep_top_p(logits[None], [p])[0], theirs(TopPLogitsWarper(p), logits))


def test_the_smallest_top_p_that_a_number_can_be_keeps_the_likeliest(logits):
    sampling = Sampling(temperature=1.0, top_k=0, top_p=5e-324)
    assert choose(logits, sampling, [], [], torch.Generator()) == int(logits.argmax())


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p_as_transformers(logits, p):
    assert torch.equal(sampler.keep_min_p(logits[None], [p])[0], theirs(MinPLogitsWarper(p), logits))


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.8])
def test_repetition_penalty_as_transformers(logits, penalty):
    history = [3, 5, 5, 199]
    expected = theirs(RepetitionPenaltyLogitsProcessor(penalty), logits, history)
    assert torch.equal(sampler.penalise_repetition(logits[None], [history], [penalty])[0], expected)


def draws(logits, sampling, n=4000):
    random = torch.Generator().manual_seed(3)
    chosen = torch.tensor([choose(logits, sampling, [0], [], random) for _ in range(n)])
    return torch.bincount(chosen, minlength=logits.numel()) / n


def test_draws_follow_the_tempered_and_filtered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -6.0])
    sampling = Sampling(temperature=2.0, top_k=4)
    expected = (logits[:4] / 2).softmax(-1)
    assert torch.allclose(draws(logits, sampling)[:4], expected, atol=0.03)
    assert draws(logits, sampling)[4] == 0


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0, top_k=0), Sampling(temperature=2, top_k=1)])
def test_temperature_0_and_top_k_1_take_the_likeliest(logits, sampling):
    assert choose(logits, sampling, [], [], torch.Generator()) == int(logits.argmax())


def test_the_same_seed_draws_the_same(logits):
    sampling = Sampling(temperature=1.0, top_k=0)
    pairs = [
        [choose(logits, sampling, [], [], random) for _ in range(30)]
        for random in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))
    ]
    assert pairs[0] == pairs[1] and len(set(pairs[0])) > 1


def test_a_bias_is_added_as_in_transformers(logits):
    bias = {3: 2.5, 199: -100.0}
    expected = theirs(SequenceBiasLogitsProcessor({(id,): value for id, value in bias.items()}), logits)
    assert torch.equal(sampler.add_bias(logits[None], [bias])[0], expected)


@pytest.mark.parametrize(("frequency", "presence"), [(0.0, 1.5), (0.7, 0.0), (-1.0, 0.25)])
def test_penalties_follow_the_formula_of_the_api_reference(logits, frequency, presence):
    answer = [3, 5, 5, 199, 5]
    expected = [
        mu - answer.count(j) * frequency - float(answer.count(j) > 0) * presence for j, mu in enumerate(logits.tolist())
    ]
    found = sampler.penalise_frequency(logits[None], [answer], [(frequency, presence)])[0]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


def test_only_the_answer_counts_for_frequency_and_presence_and_the_prompt_as_well_for_repetition():
    logits = torch.tensor([3.0, 2.0, 1.0])

    def chosen(prompt, answer, **penalty):
        return choose(logits, Sampling(**penalty), prompt, answer, torch.Generator())

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
    chosen = {choose(logits, sampling, [], [], random, Allows(size, *allowed)) for _ in range(60)}
    assert chosen <= set(allowed) and (sampling.greedy or len(chosen) > 1)


@pytest.mark.parametrize("sampling", [Sampling(logit_bias={1: 1.0}), Sampling(temperature=1.0, top_k=0)])
@pytest.mark.parametrize("broken", [[float("nan"), 0.0, 1.0], [float("inf"), 0.0, 1.0], [-float("inf")] * 3])
def test_scores_that_are_no_numbers_are_told(broken, sampling):
    with pytest.raises(BrokenLogits, match="no usable scores"):
        choose(torch.tensor(broken), sampling, [], [], torch.Generator())


SETTINGS = [
    Sampling(),
    Sampling(temperature=1.0, top_k=0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.5, top_k=0, top_p=0.8),
    Sampling(temperature=2.0, top_k=0, min_p=0.05),
    Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.02),
    Sampling(logit_bias={3: 4.0, 17: -2.0}),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=1.0, top_k=0, repetition_penalty=0.8, frequency_penalty=0.4, logit_bias={7: 2.0}),
    Sampling(temperature=1.2, top_k=7, presence_penalty=-1.0),
    Sampling(temperature=1.0, top_k=500),
]
HISTORY = [3, 5, 5, 199, 5, 8, 17]


def rows_of(settings, constraints=None):
    constraints = constraints or [None] * len(settings)
    return [
        Row(each, HISTORY[: place % 7 + 1], place % 3, torch.Generator().manual_seed(place), constraints[place])
        for place, each in enumerate(settings)
    ]


@pytest.mark.parametrize("size", [200, 32_000])
def test_rows_of_mixed_settings_get_together_what_each_gets_alone(size):
    logits = torch.randn(len(SETTINGS), size, generator=torch.Generator().manual_seed(9)) * 3
    together, alone = rows_of(SETTINGS), rows_of(SETTINGS)
    for _ in range(20):
        expected = [sampler.sample(each[None], [row]).read()[0] for each, row in zip(logits, alone, strict=True)]
        assert sampler.sample(logits, together).read() == expected
        logits = logits.roll(31, -1)


def test_rows_of_mixed_settings_are_filtered_as_by_transformers_one_by_one():
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(4)) * 3
    ks, ps = [1, 0, 200, 7, -1, 50], [0.3, 1.0, 0.9, 0.01, 0.999, 0.5]
    for place, (k, p) in enumerate(zip(ks, ps, strict=True)):
        one = logits[place]
        wanted = theirs(TopKLogitsWarper(k), one) if k > 0 else one
        assert torch.equal(sampler.keep_top_k(logits, ks)[place], wanted)
        wanted = theirs(TopPLogitsWarper(p), one) if p < 1 else one
        assert torch.equal(sampler.keep_top_p(logits, ps)[place], wanted)
        assert torch.equal(sampler.keep_min_p(logits, ps)[place], theirs(MinPLogitsWarper(p), one))
    histories, penalties = [[], [3, 5, 5], [199], [7], [], [1, 2]], [1.0, 1.3, 0.7, 1.0, 2.0, 5.0]
    found = sampler.penalise_repetition(logits, histories, penalties)
    for one, row, history, penalty in zip(logits, found, histories, penalties, strict=True):
        wanted = theirs(RepetitionPenaltyLogitsProcessor(penalty), one, history) if history else one
        assert torch.equal(row, wanted)


def test_a_draw_is_that_of_torch_multinomial(logits):
    sampling, random = Sampling(temperature=1.0, top_k=0), torch.Generator().manual_seed(5)
    probabilities = (logits - logits.max()).softmax(-1)
    expected = [int(torch.multinomial(probabilities, 1, generator=random)) for _ in range(20)]
    random.manual_seed(5)
    assert [choose(logits, sampling, [], [], random) for _ in range(20)] == expected


class TooComplex:
    def mask(self):
        raise RequestError("too complex")


def test_a_row_that_fails_fails_alone_and_changes_no_other_draw():
    logits = torch.randn(len(SETTINGS), 200, generator=torch.Generator().manual_seed(9)) * 3
    expected = sampler.sample(logits, rows_of(SETTINGS)).read()
    constraints = [TooComplex() if place == 3 else None for place in range(len(SETTINGS))]
    broken = logits.clone()
    broken[5, 77] = float("nan")
    found = sampler.sample(broken, rows_of(SETTINGS, constraints)).read()
    assert isinstance(found[3], RequestError) and isinstance(found[5], BrokenLogits)
    assert [x for place, x in enumerate(found) if place not in (3, 5)] == [
        x for place, x in enumerate(expected) if place not in (3, 5)
    ]


def test_rows_with_and_without_a_constraint_are_sampled_together():
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(2))
    settings = [Sampling(), Sampling(), Sampling(temperature=5.0, top_k=0)]
    constraints = [None, Allows(150, 7), Allows(300, 80, 149)]
    choices = sampler.sample(logits, rows_of(settings, constraints)).read()
    free, forced, drawn = (choice.token_id for choice in choices)
    assert free == int(logits[0].argmax()) and forced == 7 and drawn in (80, 149)
