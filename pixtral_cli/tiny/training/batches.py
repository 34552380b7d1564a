"""Makes training batches: token ids with labels, pictures, and the content of each patch. Knows no model.

Several questions share one picture in a sequence: `[picture][Q1 A1][Q2 A2]…`. Every token has a `group`. Group 0, the
picture, is seen by all later tokens. Each question is a group that is seen only by itself, and its positions start
again after the picture. This is equal to single-turn chat, but much cheaper.

Letters: B sequences, T tokens, S answers, P patches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from pixtral_cli.tiny.questions import KINDS, PAIR_KIND, Question, ask, ask_pair
from pixtral_cli.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    FULL,
    LETTERS,
    SHAPES,
    Scene,
    Shape,
    Style,
    draw,
    random_scene,
    scene_rng,
)
from pixtral_cli.tiny.training.smalltalk import ABOUT, off_topic
from pixtral_cli.tiny.training.tokenizer import BOS, END_INST, EOS, IMG, IMG_BREAK, IMG_END, INST, PAD

OTHER = "other"
ALL_KINDS = (*KINDS, PAIR_KIND, OTHER)
IGNORE = -100
PATCH = 16  # px
CHARACTERS = LETTERS + DIGITS
Grid = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Mix:
    """What the batches of one stage are made of; weights are shares of batches."""

    style: Style = FULL
    single: float = 0.63  # one picture, many separate questions
    pair: float = 0.22  # two pictures, many separate questions
    talk: float = 0.12  # one or two pictures, several turns, text or picture first
    plain: float = 0.03  # no picture
    kinds: tuple[str, ...] = (*KINDS, "count")  # asked of every picture that allows them; counting is the hardest
    questions: int = 9
    tokens: int = 7000  # per batch, about


@dataclass
class PackedSequence:
    """One sequence being written."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)  # the number of the question that a token answers, or -1
    asked: list[Question] = field(default_factory=list)

    def add(self, ids: Sequence[int], group: int, start: int, answer: int = -1) -> None:
        """Append tokens at positions from `start`; those of an answer are learned."""
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.groups += [group] * len(ids)
        self.labels += ids if answer >= 0 else [IGNORE] * len(ids)
        self.answers += [answer] * len(ids)


@dataclass
class Batch:
    """ids, positions, groups, labels, answers: int64 [B, T]; `labels` is IGNORE outside answers, `answers` the number
    of the answer a token belongs to. `kinds` [S] is an answer's kind, `abouts` [S, 2] the patch row and column of the
    shape it is about, or -1. Per picture of a sequence: pixels uint8 [B, H, W, 3] and patch facts int64 [B, P, 10]."""

    ids: np.ndarray
    positions: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    answers: np.ndarray
    kinds: np.ndarray
    abouts: np.ndarray
    pixels: list[np.ndarray]
    facts: list[np.ndarray]


class Batches(Dataset[Batch]):
    """Batches by number, for a DataLoader: the same seed and number give the same batch.

    `abreast` batches that follow each other have equal shapes, so that as many processes take equally long.
    """

    def __init__(self, tokenizer_file: Path, seed: int, mix: Mix, abreast: int = 1) -> None:
        self.tokenizer_file, self.seed, self.mix, self.abreast = str(tokenizer_file), seed, mix, abreast

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(self.tokenizer_file)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def __getitem__(self, number: int) -> Batch:
        rng, mix = scene_rng(self.seed, number, "batch"), self.mix
        form = scene_rng(self.seed, number // self.abreast, "form")
        ways = {self._single: mix.single, self._pair: mix.pair, self._talk: mix.talk, self._plain: mix.plain}
        (make,) = form.choices(list(ways), list(ways.values()))
        return make(rng, form)

    def _single(self, rng: Random, form: Random) -> Batch:
        grid = _grid(form, self.mix.style)
        per_sequence = grid[0] * (grid[1] + 1) + 13 * self.mix.questions
        scenes = [[_scene_for(rng, self.mix.style, grid)] for _ in range(self._count(per_sequence))]
        rows = [self._shared(scene, self._questions(rng, scene[0])) for scene in scenes]
        return _collate(rows, scenes, [grid])

    def _pair(self, rng: Random, form: Random) -> Batch:
        grids = [_grid(form, self.mix.style) for _ in range(2)]
        per_sequence = sum(r * (c + 1) for r, c in grids) + 13 * self.mix.questions
        scenes = [_two_scenes(rng, self.mix.style, grids) for _ in range(self._count(per_sequence))]
        rows = [self._shared(two, [ask_pair(rng, *two) for _ in range(self.mix.questions)]) for two in scenes]
        return _collate(rows, scenes, grids)

    def _talk(self, rng: Random, form: Random) -> Batch:
        pictures = 1 if form.random() < 0.65 else 2
        grids = [_grid(form, self.mix.style) for _ in range(pictures)]
        per_sequence = sum(r * (c + 1) for r, c in grids) + 55
        rows, scenes = [], []
        for _ in range(self._count(per_sequence)):
            shown = (
                _two_scenes(rng, self.mix.style, grids)
                if pictures == 2
                else [_scene_for(rng, self.mix.style, grids[0])]
            )
            rows.append(self._turns(rng, shown))
            scenes.append(shown)
        return _collate(rows, scenes, grids)

    def _plain(self, rng: Random, form: Random) -> Batch:
        rows = []
        for _ in range(self._count(450)):
            asked = [self._other(rng, with_picture=False) for _ in range(10)]
            rows.append(self._shared([], asked))
        return _collate(rows, [[] for _ in rows], [])

    def _count(self, tokens: int) -> int:
        return max(8, round(self.mix.tokens / tokens))

    def _questions(self, rng: Random, scene: Scene) -> list[Question]:
        kinds = list(self.mix.kinds) + ["text"] * (scene.text is not None)
        chosen = [*kinds, *rng.choices(kinds, k=max(0, self.mix.questions - len(kinds)))]
        asked = [question for kind in chosen if (question := ask(rng, scene, kind))]
        return asked + [self._other(rng, with_picture=True)] * (rng.random() < 0.15)

    def _other(self, rng: Random, with_picture: bool) -> Question:
        if with_picture or rng.random() < 0.6:
            return Question(OTHER, off_topic(rng), ABOUT)
        scene = random_scene(rng)
        asked = ask_pair(rng, scene, scene) if rng.random() < 0.3 else ask(rng, scene, rng.choice(list(KINDS)))
        return Question(OTHER, asked.text if asked else "What is this?", ABOUT)

    def _shared(self, scenes: list[Scene], asked: list[Question]) -> PackedSequence:
        row = PackedSequence()
        row.add([BOS, INST, *(token for scene in scenes for token in picture_ids(scene_grid(scene)))], 0, 0)
        start = len(row.ids)
        for group, question in enumerate(asked, 1):
            ids = [*self.encode(question.text), END_INST]
            row.add(ids, group, start)
            self._answer(row, question, group, start + len(ids))
        return row

    def _answer(self, row: PackedSequence, asked: Question, group: int, start: int) -> None:
        row.add([*self.encode(asked.answer), EOS], group, start, len(row.asked))
        row.asked.append(asked)

    def _turns(self, rng: Random, scenes: list[Scene]) -> PackedSequence:
        """A conversation; the pictures stand in its first turn, before or after the text."""
        row = PackedSequence()
        row.add([BOS], 0, 0)
        pictures = [token for scene in scenes for token in picture_ids(scene_grid(scene))]
        turns = 1 if (picture_last := rng.random() < 0.5) and rng.random() < 0.5 else rng.randint(2, 4)
        for turn in range(turns):
            asked = self._turn(rng, scenes)
            text, shown = self.encode(asked.text), pictures if turn == 0 else []
            row.add([INST, *([*text, *shown] if picture_last else [*shown, *text]), END_INST], 0, len(row.ids))
            self._answer(row, asked, 0, len(row.ids))
        return row

    def _turn(self, rng: Random, scenes: list[Scene]) -> Question:
        if rng.random() < 0.04:
            return self._other(rng, with_picture=True)
        if len(scenes) == 2:
            return ask_pair(rng, *scenes)
        while not (asked := ask(rng, scenes[0], rng.choice(self.mix.kinds))):
            pass
        return asked


def picture_ids(grid: Grid) -> list[int]:
    """The tokens of one picture: rows of [IMG] with [IMG_BREAK] between and [IMG_END] last."""
    rows, columns = grid
    return ([IMG] * columns + [IMG_BREAK]) * (rows - 1) + [IMG] * columns + [IMG_END]


def _grid(rng: Random, style: Style) -> Grid:
    return scene_grid(random_scene(rng, replace(style, text_share=0, shapes=(0, 0))))


def _scene_for(rng: Random, style: Style, grid: Grid) -> Scene:
    """A scene whose natural size gives `grid`: up to 15 px short of it on each side, as real pictures are."""
    low = style.sides[0]
    height, width = (max(low, side * PATCH - rng.randint(0, PATCH - 1) * (rng.random() < 0.7)) for side in grid)
    return random_scene(rng, replace(style, size=(width, height)))


def _two_scenes(rng: Random, style: Style, grids: list[Grid]) -> list[Scene]:
    """Two scenes; often with the same background and as many shapes, so that these answers are not rare."""
    first, second = (_scene_for(rng, style, grid) for grid in grids)
    if rng.random() < 0.4:
        second = replace(second, background=first.background, background_rgb=first.background_rgb)
    return [first, second]


def _collate(rows: list[PackedSequence], scenes: list[list[Scene]], grids: list[Grid]) -> Batch:
    length = max(len(row.ids) for row in rows)

    def stack(lists: list[list[int]], fill: int) -> np.ndarray:
        return np.array([items + [fill] * (length - len(items)) for items in lists], dtype=np.int64)

    before = 0  # answers of the sequences before
    for row in rows:
        row.answers = [-1 if answer < 0 else before + answer for answer in row.answers]
        before += len(row.asked)
    asked = [(question, shown) for row, shown in zip(rows, scenes, strict=True) for question in row.asked]
    slots = [[shown[slot] for shown in scenes] for slot in range(len(grids))]
    return Batch(
        ids=stack([row.ids for row in rows], PAD),
        positions=stack([row.positions for row in rows], 0),
        groups=stack([row.groups for row in rows], -1),
        labels=stack([row.labels for row in rows], IGNORE),
        answers=stack([row.answers for row in rows], -1),
        kinds=np.array([ALL_KINDS.index(question.kind) for question, _ in asked], dtype=np.int64),
        abouts=np.array([patch_of(question.about, shown) for question, shown in asked], dtype=np.int64),
        pixels=[np.stack([pixels_of(scene, grid) for scene in slot]) for slot, grid in zip(slots, grids, strict=True)],
        facts=[np.stack([facts_of(scene, grid) for scene in slot]) for slot, grid in zip(slots, grids, strict=True)],
    )


def scene_grid(scene: Scene) -> Grid:
    return math.ceil(scene.height / PATCH), math.ceil(scene.width / PATCH)


def patch_of(shape: Shape | None, scenes: list[Scene]) -> tuple[int, int]:
    """Row and column of the patch that holds the shape's centre, in its own picture; -1 for no shape."""
    for scene in scenes:
        if shape in scene.shapes:
            rows, columns = scene_grid(scene)
            return int(shape.y / scene.height * rows), int(shape.x / scene.width * columns)
    return -1, -1


def pixels_of(scene: Scene, grid: Grid) -> np.ndarray:
    size = grid[1] * PATCH, grid[0] * PATCH
    picture = draw(scene)
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC))


def facts_of(scene: Scene, grid: Grid) -> np.ndarray:
    """int64 [P, 10]: shape, colour, character and its index where the patch holds the centre; the background; the shape
    and character that the patch is near to or a part of; and where it holds a centre, the how-manieth shape it is in
    reading order, of all, of its colour, and of its form. 0 is none, but for the background."""
    rows, columns = grid
    facts = np.zeros((rows, columns, 10), dtype=np.int64)
    facts[..., 4] = list(BACKGROUNDS).index(scene.background)
    down, right = rows / scene.height, columns / scene.width  # patches per pixel
    y, x = np.ogrid[0.5:rows, 0.5:columns]
    for shape in scene.shapes:
        at = int(shape.y * down), int(shape.x * right)
        kind = SHAPES.index(shape.name) + 1
        facts[at][:2] = kind, list(COLOURS).index(shape.colour) + 1
        near = (y - shape.y * down) ** 2 + (x - shape.x * right) ** 2 <= ((shape.radius + 6) / PATCH) ** 2
        facts[..., 5][near] = kind
    if scene.text:
        reach_down, reach_right = (scene.text.size * 0.4 + 5) / PATCH, max(8.5, scene.text.size * 0.4) / PATCH
        for index, (character, centre) in enumerate(zip(scene.text.string, scene.text.centres, strict=True)):
            kind = CHARACTERS.index(character) + 1
            facts[int(centre[1] * down), int(centre[0] * right)][2:4] = kind, index + 1
            near = (abs(y - centre[1] * down) <= reach_down) & (abs(x - centre[0] * right) <= reach_right)
            facts[..., 6][near] = kind
    return _numbered(facts.reshape(rows * columns, 10))


def _numbered(facts: np.ndarray) -> np.ndarray:
    held = facts[:, 0] > 0
    facts[held, 7] = np.arange(1, held.sum() + 1)
    for which, number in ((1, 8), (0, 9)):
        for value in set(facts[held, which]):
            same = facts[:, which] == value
            facts[same, number] = np.arange(1, same.sum() + 1)
    return facts
