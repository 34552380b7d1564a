"""Measures how well the built-in model answers: `python -m pixtral_cli.tiny.evaluate --scenes 1000 --seed 20000`.

Draws new scenes from the seed, asks about them through `Pixtral.chat_batch`, greedy and single-turn, and prints how
many answers are exactly right, for each kind of question. Seeds that training used are refused.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from PIL.Image import Image

from pixtral_cli.tiny import TRAINING_SEEDS
from pixtral_cli.tiny.questions import KINDS, PAIR_KIND, Question, ask, ask_pair
from pixtral_cli.tiny.scenes import Scene, draw, random_scene, scene_rng

PAIR_SHARE = 5  # every fifth scene is one of two that are compared
BATCH = 32


class Chats(Protocol):
    """What is asked of a model: `Pixtral.chat_batch`."""

    def chat_batch(self, conversations: list[list[dict]], **options: Any) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Trial:
    """One question with its pictures."""

    question: Question
    pictures: tuple[Image, ...]

    @property
    def messages(self) -> list[dict]:
        images = [{"type": "image", "image": picture} for picture in self.pictures]
        return [{"role": "user", "content": [*images, {"type": "text", "text": self.question.text}]}]


@dataclass
class Score:
    """How many questions of one kind were asked and answered rightly."""

    asked: int = 0
    right: int = 0

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else 0.0


def trials(scenes: int, seed: int) -> Iterator[Trial]:
    """The questions about `scenes` fresh scenes of `seed`: one of every kind that a scene allows, two about a pair.

    Raises ValueError when the seed belongs to training.
    """
    if seed in TRAINING_SEEDS:
        last = TRAINING_SEEDS[-1]
        raise ValueError(f"Seed {seed} is one of the seeds 0 to {last} that training used; take {last + 1} or above.")
    for index in range(scenes):
        rng = scene_rng(seed, index, "evaluation")
        scene = random_scene(rng)
        if index % PAIR_SHARE == 0:
            other = random_scene(rng)
            pictures = draw(scene), draw(other)
            yield from (Trial(ask_pair(rng, scene, other), pictures) for _ in range(2))
        else:
            yield from _about(rng, scene)


def _about(rng, scene: Scene) -> Iterator[Trial]:
    pictures = (draw(scene),)
    for kind in KINDS:
        if asked := ask(rng, scene, kind):
            yield Trial(asked, pictures)


def score(model: Chats, questions: Iterator[Trial], wrong: list[tuple[Trial, str]] | None = None) -> dict[str, Score]:
    """Ask all `questions`; the answers that are not right are appended to `wrong`."""
    scores = {kind: Score() for kind in (*KINDS, PAIR_KIND)}
    while batch := list(islice(questions, BATCH)):
        replies = model.chat_batch([trial.messages for trial in batch], max_new_tokens=64)
        for trial, reply in zip(batch, replies, strict=True):
            answered = scores[trial.question.kind]
            answered.asked += 1
            answered.right += reply.text == trial.question.answer
            if wrong is not None and reply.text != trial.question.answer:
                wrong.append((trial, reply.text))
    return {kind: found for kind, found in scores.items() if found.asked}


def table(scores: dict[str, Score]) -> str:
    """The scores as a Markdown table."""
    rows = [f"| {kind} | {found.asked} | {found.right} | {found.share:.1%} |" for kind, found in scores.items()]
    return "\n".join(["| kind of question | asked | right | share |", "| --- | ---: | ---: | ---: |", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pixtral_cli.tiny.evaluate", description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, required=True, help=f"{TRAINING_SEEDS[-1] + 1} or above")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    parser.add_argument("--model-path", default="tiny", help="another folder in the same form")
    parser.add_argument("--quantization-encoding", help="how the weights are kept; by default as they are")
    parser.add_argument("--wrong", type=int, default=0, help="print this many wrong answers to standard error")
    options = parser.parse_args(arguments)
    try:
        questions = trials(options.scenes, options.seed)
        first = list(islice(questions, 1))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    from pixtral_cli import Pixtral

    model = Pixtral.load(options.model_path, quantization_encoding=options.quantization_encoding, max_batch_size=BATCH)
    wrong: list[tuple[Trial, str]] = []
    scores = score(model, iter([*first, *questions]), wrong)
    for trial, text in wrong[: options.wrong]:
        print(f"{trial.question.text!r}: {text!r} instead of {trial.question.answer!r}", file=sys.stderr)
    print(_as_json(options, scores) if options.json else table(scores))
    return 0


def _as_json(options: argparse.Namespace, scores: dict[str, Score]) -> str:
    kinds = [{"kind": kind, "asked": found.asked, "right": found.right} for kind, found in scores.items()]
    return json.dumps({"seed": options.seed, "scenes": options.scenes, "kinds": kinds})


if __name__ == "__main__":
    sys.exit(main())
