"""The table counts what it says, on scenes that training never saw; and the shipped model looks."""

import json
from types import SimpleNamespace

import pytest

from pixtral_cli.tiny import TRAINING_SEEDS, evaluate
from pixtral_cli.tiny.evaluate import Score, main, score, table, trials

SEED = TRAINING_SEEDS[-1] + 4321


class Knows:
    """Answers the trials it was given, in order, the way `answer` says."""

    def __init__(self, questions, answer):
        self.answers = iter([answer(trial.question) for trial in questions])

    def chat_batch(self, conversations, **options):
        return [SimpleNamespace(text=next(self.answers)) for _ in conversations]


def test_an_all_knowing_model_gets_everything_right():
    asked = list(trials(30, SEED))
    scores = score(Knows(asked, lambda asked: asked.answer), iter(asked))
    assert sum(found.asked for found in scores.values()) == len(asked)
    assert all(found.right == found.asked for found in scores.values())


def test_an_answer_that_is_only_nearly_right_does_not_count():
    asked, wrong = list(trials(30, SEED)), []
    scores = score(Knows(asked, lambda asked: asked.answer + "."), iter(asked), wrong)
    assert all(found.right == 0 for found in scores.values())
    assert len(wrong) == len(asked)


def test_every_kind_of_question_is_asked():
    kinds = {trial.question.kind for trial in trials(40, SEED)}
    assert kinds == {"shape", "colour", "place", "count", "background", "text", "describe", "two pictures"}


def test_the_same_seed_asks_the_same_and_another_seed_does_not():
    first, again, other = ([t.question for t in trials(10, seed)] for seed in (SEED, SEED, SEED + 1))
    assert first == again != other


@pytest.mark.parametrize("seed", [0, 1, TRAINING_SEEDS[-1]])
def test_seeds_of_training_are_refused_with_one_sentence(seed, capsys):
    assert main(["--scenes", "5", "--seed", str(seed)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and str(TRAINING_SEEDS[-1] + 1) in shown.err


def test_the_table_shows_kind_asked_right_and_share():
    assert table({"place": Score(8, 7)}).splitlines()[-1] == "| place | 8 | 7 | 87.5% |"


@pytest.fixture(scope="module")
def model():
    from pixtral_cli import Pixtral

    return Pixtral.load("tiny", devices="cpu")


def test_the_shipped_model_looks_at_the_picture(model):
    scores = score(model, trials(16, SEED))
    asked, right = (sum(getattr(found, field) for found in scores.values()) for field in ("asked", "right"))
    assert right >= 0.9 * asked, table(scores)


def test_json_is_one_object(model, monkeypatch, capsys):
    import pixtral_cli

    monkeypatch.setattr(pixtral_cli, "Pixtral", SimpleNamespace(load=lambda *args, **options: model), raising=False)
    assert main(["--scenes", "2", "--seed", str(SEED), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seed"] == SEED and {"kind", "asked", "right"} == set(found["kinds"][0])


def test_what_it_was_never_taught_gets_the_same_honest_answer(model):
    from pixtral_cli.tiny.training.smalltalk import ABOUT

    for text in ("Tell me a joke.", "What is the capital of France?", "Who are you?"):
        assert model.chat([{"role": "user", "content": text}], max_new_tokens=64).text == ABOUT


def test_evaluation_and_training_draw_from_different_seeds():
    from pixtral_cli.tiny.training.train import SEED as TRAINED

    assert TRAINED in TRAINING_SEEDS and evaluate.TRAINING_SEEDS is TRAINING_SEEDS
