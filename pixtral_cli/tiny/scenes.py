"""Makes random scenes and draws their pictures, which the built-in model learns from. Knows no question and no model.

A scene is a list of facts: shapes with colours and places, printed text, a background. The facts are chosen first, and
`draw` makes pixels from them, so every answer is known exactly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

Rgb = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Rgb] = {
    "red": (215, 35, 40),
    "green": (45, 165, 65),
    "blue": (40, 85, 225),
    "yellow": (245, 215, 45),
    "orange": (245, 135, 25),
    "purple": (130, 45, 170),
    "pink": (250, 130, 190),
    "brown": (120, 75, 35),
}
BACKGROUNDS: dict[str, Rgb] = {
    "white": (248, 248, 248),
    "black": (12, 12, 12),
    "grey": (128, 128, 128),
    "cream": (250, 233, 195),
    "light blue": (180, 212, 245),
    "navy": (22, 30, 85),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
MIN_SPACING = 16  # px between glyph centres: one patch each, at least
JITTER = 9  # levels a colour may move, per channel


def place_name(row: int, column: int) -> str:
    """The name of a cell of the 3x3 grid: "top left", "middle", "bottom middle" …"""
    return "middle" if (row, column) == (1, 1) else f"{ROWS[row]} {COLUMNS[column]}"


@dataclass(frozen=True)
class Shape:
    """One coloured shape; `x`, `y` (centre) and `radius` are pixels, `row` and `column` its cell of the 3x3 grid."""

    name: str
    colour: str
    rgb: Rgb
    row: int
    column: int
    x: float
    y: float
    radius: float

    @property
    def place(self) -> str:
        return place_name(self.row, self.column)


@dataclass(frozen=True)
class Printed:
    """Capital letters or digits in one line; `centres` are pixels, one per character; `row` the band it fills."""

    string: str
    size: int
    centres: tuple[Point, ...]
    ink: Rgb
    row: int


@dataclass(frozen=True)
class Scene:
    """Everything that is true of one picture of `width` x `height` pixels."""

    width: int
    height: int
    background: str
    background_rgb: Rgb
    shapes: tuple[Shape, ...] = ()
    text: Printed | None = None


@dataclass(frozen=True)
class Style:
    """How scenes are drawn by chance: sides in pixels (log-uniform), how many shapes, how often text."""

    sides: tuple[int, int] = (64, 256)
    shapes: tuple[int, int] = (1, 5)
    text_share: float = 0.35
    text_alone_share: float = 0.4  # of the scenes with text: those without any shape
    size: tuple[int, int] | None = field(default=None)  # a fixed (width, height) instead of `sides`


FULL = Style()


def scene_rng(seed: int, index: int, stream: str = "scene") -> Random:
    """The random numbers of scene `index` of `seed`: any scene can be drawn again alone."""
    return Random(f"{stream}/{seed}/{index}")


def random_scene(rng: Random, style: Style = FULL) -> Scene:
    """A scene by chance."""
    width, height = style.size or (_side(rng, style), _side(rng, style))
    background = rng.choice(tuple(BACKGROUNDS))
    scene = Scene(width, height, background, _jittered(rng, BACKGROUNDS[background]))
    if rng.random() >= style.text_share:
        return replace(scene, shapes=_random_shapes(rng, scene, range(3), style.shapes))
    alone = rng.random() < style.text_alone_share
    text = _random_text(rng, scene, alone)
    free = [row for row in range(3) if row != text.row]
    shapes = () if alone else _random_shapes(rng, scene, free, style.shapes)
    return replace(scene, text=text, shapes=shapes)


def _side(rng: Random, style: Style) -> int:
    low, high = style.sides
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _jittered(rng: Random, rgb: Rgb) -> Rgb:
    red, green, blue = (min(255, max(0, level + rng.randint(-JITTER, JITTER))) for level in rgb)
    return red, green, blue


def _random_shapes(rng: Random, scene: Scene, rows, count: tuple[int, int]) -> tuple[Shape, ...]:
    cells = [(row, column) for row in rows for column in range(3)]
    chosen = sorted(rng.sample(cells, rng.randint(*count)))
    return tuple(_random_shape(rng, scene, row, column) for row, column in chosen)


def _random_shape(rng: Random, scene: Scene, row: int, column: int) -> Shape:
    wide, high = scene.width / 3, scene.height / 3
    radius = min(wide, high) * rng.uniform(0.36, 0.48)
    x = (column + 0.5) * wide + _slack(rng, wide, radius)
    y = (row + 0.5) * high + _slack(rng, high, radius)
    colour = rng.choice(tuple(COLOURS))
    return Shape(rng.choice(tuple(OUTLINES)), colour, _jittered(rng, COLOURS[colour]), row, column, x, y, radius)


def _slack(rng: Random, cell: float, radius: float) -> float:
    """How far a centre moves from the middle of its cell: the shape stays inside it, and near enough to be placed."""
    return rng.uniform(-1, 1) * min(cell / 2 - radius, cell / 4)


def _random_text(rng: Random, scene: Scene, alone: bool) -> Printed:
    row = rng.randrange(3)
    room = scene.height * 0.85 if alone else scene.height / 3
    size = round(rng.uniform(18, min(48, max(20, room * 1.1))))
    letters, longest = (LETTERS, 5) if rng.random() < 0.6 else (DIGITS, 4)
    size = min(size, round((scene.width - 4) / 1.1))
    spacing = max(MIN_SPACING, size * rng.uniform(0.9, 1.1))
    count = rng.randint(1, min(longest, int((scene.width - 4) / spacing)))
    half = spacing * count / 2
    x = rng.uniform(half + 1, scene.width - half - 1) - half + spacing / 2
    y = _text_y(rng, scene, row, size, alone)
    ink = rng.randint(0, 40) if sum(scene.background_rgb) > 330 else rng.randint(215, 255)
    string = "".join(rng.choice(letters) for _ in range(count))
    return Printed(string, size, tuple((x + i * spacing, y) for i in range(count)), (ink, ink, ink), row)


def _text_y(rng: Random, scene: Scene, row: int, size: int, alone: bool) -> float:
    half = size * 0.4
    low, high = (0.0, scene.height) if alone else (scene.height * row / 3, scene.height * (row + 1) / 3)
    low, high = low + half + 1, high - half - 1
    return rng.uniform(low, high) if low < high else (low + high) / 2


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: an RGB image of `scene.width` x `scene.height`."""
    picture = Image.new("RGB", (scene.width, scene.height), scene.background_rgb)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        OUTLINES[shape.name](pen, shape)
    if scene.text:
        _print(pen, scene.text)
    return picture


def _print(pen: ImageDraw.ImageDraw, text: Printed) -> None:
    font, lower = _font(text.size), text.size * 0.03  # capitals sit a little above the middle that "mm" means
    for character, (x, y) in zip(text.string, text.centres, strict=True):
        pen.text((x, y + lower), character, fill=text.ink, font=font, anchor="mm")


@cache
def _font(size: int):
    return ImageFont.load_default(size)


def _circle(pen: ImageDraw.ImageDraw, s: Shape) -> None:
    pen.ellipse((s.x - s.radius, s.y - s.radius, s.x + s.radius, s.y + s.radius), fill=s.rgb)


def _polygon(*unit: Point) -> Callable[[ImageDraw.ImageDraw, Shape], None]:
    """A drawer of the polygon whose corners are given in units of the radius."""
    return lambda pen, s: pen.polygon([(s.x + x * s.radius, s.y + y * s.radius) for x, y in unit], fill=s.rgb)


def _star_corners() -> list[Point]:
    lengths = (1.05, 0.42)
    turns = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [(lengths[i % 2] * math.cos(t), lengths[i % 2] * math.sin(t)) for i, t in enumerate(turns)]


_ARM = 0.32  # half the width of a cross's arms
OUTLINES: dict[str, Callable[[ImageDraw.ImageDraw, Shape], None]] = {
    "circle": _circle,
    "square": _polygon((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": _polygon((0, -1), (1, 0.85), (-1, 0.85)),
    "star": _polygon(*_star_corners()),
    "cross": _polygon(
        (-_ARM, -1),
        (_ARM, -1),
        (_ARM, -_ARM),
        (1, -_ARM),
        (1, _ARM),
        (_ARM, _ARM),
        (_ARM, 1),
        (-_ARM, 1),
        (-_ARM, _ARM),
        (-1, _ARM),
        (-1, -_ARM),
        (-_ARM, -_ARM),
    ),
    "diamond": _polygon((0, -1.05), (0.8, 0), (0, 1.05), (-0.8, 0)),
}
SHAPES = tuple(OUTLINES)
