"""A scene in, its pixels on the patch grid and what each patch holds out; knows no tokens and no model."""

import math

import numpy as np
from PIL import Image

from .scenes import BACKGROUNDS, COLOURS, DIGITS, LETTERS, SHAPES, Scene, Shape, draw

PATCH = 16  # px
CHARACTERS = LETTERS + DIGITS
Grid = tuple[int, int]  # rows, columns


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
