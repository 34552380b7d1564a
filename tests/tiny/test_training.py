"""What is trained on is what is asked later, and training goes on where it stopped."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixtral_cli.prompt.messages import parse
from pixtral_cli.source import Source
from pixtral_cli.tiny import FOLDER
from pixtral_cli.tiny.scenes import Style
from pixtral_cli.tiny.training.batches import IGNORE, Batches, Mix
from pixtral_cli.tiny.training.losses import losses
from pixtral_cli.tiny.training.tokenizer import END_INST, EOS, IMG, INST, PAD
from pixtral_cli.tiny.training.train import SEED, Options, Trainer, learning_rate

SMALL = Style(sides=(64, 80), shapes=(1, 3))
WAYS = {
    "single": Mix(SMALL, single=1, pair=0, talk=0, plain=0, tokens=100),
    "pair": Mix(SMALL, single=0, pair=1, talk=0, plain=0, tokens=100),
    "talk": Mix(SMALL, single=0, pair=0, talk=1, plain=0, tokens=100),
    "plain": Mix(SMALL, single=0, pair=0, talk=0, plain=1, tokens=100),
}


def batch_of(way: str, number: int = 0):
    return Batches(FOLDER / "tokenizer.json", SEED, WAYS[way])[number]


@pytest.mark.parametrize("way", WAYS)
def test_the_same_seed_and_number_give_the_same_batch(way):
    first, second = batch_of(way, 3), batch_of(way, 3)
    assert np.array_equal(first.ids, second.ids)
    assert all(np.array_equal(a, b) for a, b in zip(first.pixels, second.pixels, strict=True))
    assert not np.array_equal(first.ids, batch_of(way, 4).ids)


def sequences(batch):
    """Each question of the first sequence as it would stand alone: (prompt ids, answer ids)."""
    ids, groups, labels = batch.ids[0], batch.groups[0], batch.labels[0]
    for group in range(1, groups.max() + 1):
        own = (groups == 0) | (groups == group)
        asked = own & (labels == IGNORE)
        assert list(batch.positions[0][own]) == list(range(own.sum()))
        yield ids[asked].tolist(), ids[own & (labels != IGNORE)].tolist()


@pytest.mark.parametrize("way", ["single", "pair", "plain"])
def test_prompts_in_training_are_those_of_the_chat_template(way):
    processor = Source.open("tiny").processor
    batch = batch_of(way)
    pictures = [{"type": "image", "image": Image.fromarray(pixels[0])} for pixels in batch.pixels]
    for prompt, answer in sequences(batch):
        text = processor.tokenizer
        question = b"".join(text.token_bytes(i) for i in prompt).decode()
        content = [*pictures, {"type": "text", "text": question}]
        assert processor.chat(parse([{"role": "user", "content": content}])).token_ids == prompt
        assert answer[-1] == EOS and b"".join(text.token_bytes(i) for i in answer)


def test_conversations_in_training_are_those_of_the_chat_template():
    processor = Source.open("tiny").processor
    batch = next(batch for batch in map(partial(batch_of, "talk"), range(9)) if (batch.ids[0] == EOS).sum() > 1)
    ids, labels = batch.ids[0].tolist(), batch.labels[0]
    messages, text = [], processor.tokenizer
    pictures = [{"type": "image", "image": Image.fromarray(pixels[0])} for pixels in batch.pixels]
    for question, answer in turns_of(ids):
        said = [{"type": "text", "text": b"".join(text.token_bytes(i) for i in question).decode()}]
        messages.append({"role": "user", "content": [*pictures, *said] if question[0] == IMG else [*said, *pictures]})
        messages.append({"role": "assistant", "content": b"".join(text.token_bytes(i) for i in answer).decode()})
        pictures = []
    assert len(messages) > 2
    last = processor.chat(parse(messages[:-1])).token_ids
    assert ids[: len(last)] == last and labels[len(last)] != IGNORE and labels[len(last) - 1] == IGNORE


def turns_of(ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """[BOS] ([INST] question [/INST] answer [EOS])… -> (question, answer) pairs."""
    part: list[int] = []
    for token in ids[1:]:
        if token == END_INST:
            question, part = part, []
        elif token == EOS:
            yield question, part
            part = []
        elif token not in (INST, PAD):
            part.append(token)


def test_questions_that_share_a_picture_do_not_see_each_other():
    trainer = Trainer(Path(), torch.device("cpu"), 1e-3)
    batch = batch_of("single")
    together = losses(trainer.model, trainer.heads, batch, trainer.device).answer
    other = batch_of("single")
    first = (other.groups == 1) & (other.labels == IGNORE)
    other.ids[first] = np.where(other.ids[first] > 31, other.ids[first][::-1], other.ids[first])
    keep = other.groups != 1
    for changed in (batch, other):
        changed.labels[~keep] = IGNORE
    without, with_other_question = (
        losses(trainer.model, trainer.heads, each, trainer.device).answer for each in (batch, other)
    )
    assert not torch.equal(together, without)
    assert torch.equal(without, with_other_question)


def test_training_goes_on_from_its_checkpoint(tmp_path):
    device, batches = torch.device("cpu"), [batch_of("single", number) for number in range(3)]
    whole = Trainer(tmp_path, device, 1e-3)
    for number, batch in enumerate(batches):
        if number == 2:
            whole.save()
        whole.step(batch, 1.0, see_only=False, helping=0.3)
    resumed = Trainer(tmp_path, device, 1e-3)
    assert resumed.resume()
    resumed.step(batches[2], 1.0, see_only=False, helping=0.3)
    assert all(torch.equal(a, b) for a, b in zip(whole.masters, resumed.masters, strict=True))


def test_the_learning_rate_warms_up_stays_and_cools_down():
    options = Options(Path(), 100, 0.3, 1e-3, 0.3, 1, 0, None)
    assert learning_rate(0, 0, options) < 0.02
    assert learning_rate(500, 60 * 50, options) == 1
    assert learning_rate(500, 60 * 85, options) == pytest.approx(0.5)
    assert learning_rate(500, 60 * 100, options) == 0
