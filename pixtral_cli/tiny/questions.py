"""Makes questions about one scene or two, each with its one right answer. Knows no pixels and no model.

Every function that makes questions returns candidates. Each is true and unambiguous for the given scene, and the caller
chooses among them. Answers are exact strings: "red", "top left", "3", "yes", "K7".
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from pixtral_cli.tiny.scenes import COLOURS, SHAPES, Scene, Shape, place_name

Candidate = tuple[str, str] | tuple[str, str, Shape]  # question, answer, and the one shape that it is about
NOTHING = "nothing"
NO_TEXT = "no text"
NUMBERS = ("no", "one", "two", "three", "four", "five")
PLURALS = {name: "crosses" if name == "cross" else f"{name}s" for name in SHAPES}


@dataclass(frozen=True)
class Question:
    """One question of one kind, with the answer it must get."""

    kind: str
    text: str
    answer: str
    about: Shape | None = None


def ask(rng: Random, scene: Scene, kind: str) -> Question | None:
    """A question of `kind` (one of KINDS) about `scene`, or None where the scene allows none."""
    candidates = KINDS[kind](rng, scene)
    if not candidates:
        return None
    return _question(rng, kind, rng.choice(candidates))


def ask_pair(rng: Random, first: Scene, second: Scene) -> Question:
    """A question over two pictures."""
    return _question(rng, PAIR_KIND, rng.choice(_pair_forms(rng))(rng, first, second))


def _question(rng: Random, kind: str, candidate: Candidate) -> Question:
    question, answer, *about = candidate
    return Question(kind, _as_typed(rng, question), answer, *about)


def _as_typed(rng: Random, question: str) -> str:
    """Questions as people type them: now and then American, without a capital, or without the mark."""
    if rng.random() < 0.3:
        question = question.replace("colour", "color")
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    return question.rstrip("?.") if rng.random() < 0.1 else question


def _pick(rng: Random, *forms: str, **words: str) -> str:
    return rng.choice(forms).format(**words)


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _name(shape: Shape) -> str:
    return f"{shape.colour} {shape.name}"


def _only(scene: Scene, key: Callable[[Shape], object]) -> list[Shape]:
    """The shapes that are the only one with their key."""
    counts = Counter(key(shape) for shape in scene.shapes)
    return [shape for shape in scene.shapes if counts[key(shape)] == 1]


def _wanted(rng: Random, present: Sequence[str], all_names: Sequence[str]) -> str:
    """A name that is in the scene half of the time, so that yes and no are equally common."""
    absent = [name for name in all_names if name not in present]
    pool = present if present and (rng.random() < 0.5 or not absent) else absent
    return rng.choice(list(pool))


def _empty_place(rng: Random, scene: Scene) -> str:
    """A cell without a shape, outside the band of the text, "" where none is left."""
    taken = {(shape.row, shape.column) for shape in scene.shapes}
    free = [
        (row, column)
        for row in range(3)
        for column in range(3)
        if (row, column) not in taken and not (scene.text and (not scene.shapes or scene.text.row == row))
    ]
    return place_name(*rng.choice(free)) if free else ""


def _shape(rng: Random, scene: Scene) -> list[Candidate]:
    found: list[Candidate] = []
    if len(scene.shapes) == 1:
        form = _pick(rng, "What shape is this?", "What shape is in the picture?", "Which shape do you see?")
        found.append((form, scene.shapes[0].name, scene.shapes[0]))
    for shape in _only(scene, lambda s: s.colour):
        form = _pick(rng, "What shape is {c}?", "What shape is the {c} one?", "Which shape is {c}?", c=shape.colour)
        found.append((form, shape.name, shape))
    for shape in scene.shapes:
        form = _pick(rng, "What shape is in the {p}?", "Which shape is at the {p}?", p=shape.place)
        found.append((form, shape.name, shape))
        form = _pick(rng, "What is in the {p}?", "What is at the {p}?", "What do you see in the {p}?", p=shape.place)
        found.append((form, _article(_name(shape)), shape))
    if (place := _empty_place(rng, scene)) and rng.random() < 0.5:
        found.append((_pick(rng, "What is in the {p}?", "What shape is in the {p}?", p=place), NOTHING))
    found.append(_is_there(rng, scene))
    return found


def _is_there(rng: Random, scene: Scene) -> Candidate:
    if rng.random() < 0.5:
        present = sorted({shape.name for shape in scene.shapes})
        wanted = _wanted(rng, present, SHAPES)
    else:
        present = sorted({_name(shape) for shape in scene.shapes})
        wanted = _wanted(rng, present, [f"{c} {s}" for c in COLOURS for s in SHAPES])
    form = _pick(rng, "Is there {a}?", "Is there {a} in the picture?", "Do you see {a}?", a=_article(wanted))
    return form, "yes" if wanted in present else "no"


def _colour(rng: Random, scene: Scene) -> list[Candidate]:
    found: list[Candidate] = []
    if len(scene.shapes) == 1:
        form = _pick(rng, "What colour is the shape?", "What colour is it?", "Which colour does the shape have?")
        found.append((form, scene.shapes[0].colour, scene.shapes[0]))
    for shape in _only(scene, lambda s: s.name):
        form = _pick(
            rng, "What colour is the {s}?", "Which colour is the {s}?", "What is the colour of the {s}?", s=shape.name
        )
        found.append((form, shape.colour, shape))
    for shape in scene.shapes:
        form = _pick(
            rng,
            "What colour is the shape in the {p}?",
            "What colour is the {s} in the {p}?",
            "What colour is the shape at the {p}?",
            s=shape.name,
            p=shape.place,
        )
        found.append((form, shape.colour, shape))
    present = sorted({shape.colour for shape in scene.shapes})
    wanted = _wanted(rng, present, tuple(COLOURS))
    form = _pick(rng, "Is there a shape that is {c}?", "Is there anything {c}?", "Is any shape {c}?", c=wanted)
    return [*found, (form, "yes" if wanted in present else "no")]


def _place(rng: Random, scene: Scene) -> list[Candidate]:
    found: list[Candidate] = []
    if len(scene.shapes) == 1:
        found.append((_pick(rng, "Where is the shape?", "Where is it?"), scene.shapes[0].place, scene.shapes[0]))
    keys: tuple[tuple[Callable[[Shape], str], str], ...] = (
        (lambda s: s.name, "{k}"),
        (lambda s: s.colour, "{k} shape"),
        (_name, "{k}"),
    )
    for key, words in keys:
        for shape in _only(scene, key):
            what = words.format(k=key(shape))
            form = _pick(rng, "Where is the {w}?", "In which place is the {w}?", "Where do you see the {w}?", w=what)
            found.append((form, shape.place, shape))
    return found


def _count(rng: Random, scene: Scene) -> list[Candidate]:
    names = Counter(shape.name for shape in scene.shapes)
    colours = Counter(shape.colour for shape in scene.shapes)
    name, colour = rng.choice([*names, rng.choice(SHAPES)]), rng.choice([*colours, rng.choice(tuple(COLOURS))])
    whole = rng.choice(["shapes", "shapes", "shapes", "objects"])
    asked = ((whole, len(scene.shapes)), (PLURALS[name], names[name]), (f"{colour} shapes", colours[colour]))
    return [
        (
            _pick(
                rng,
                "How many {w} are there?",
                "How many {w} do you see?",
                "How many {w} are in the picture?",
                "How many {w} can you see?",
                "Count the {w}.",
                w=what,
            ),
            str(count),
        )
        for what, count in asked
    ]


def _background(rng: Random, scene: Scene) -> list[Candidate]:
    form = _pick(
        rng,
        "What colour is the background?",
        "Which colour is the background?",
        "What is the background colour?",
        "What is the colour of the background?",
    )
    return [(form, scene.background)]


def _text(rng: Random, scene: Scene) -> list[Candidate]:
    """What is printed; a scene without text is asked now and then, so that "no text" is an answer too."""
    if rng.random() < 0.06:
        return [(_pick(rng, "Is there any text?", "Is there text in the picture?"), "yes" if scene.text else "no")]
    forms = [
        "What does it say?",
        "What is written here?",
        "Read the text.",
        "What text is printed?",
        "What is written in the picture?",
        "Which text do you see?",
        "What does the text say?",
        "What is the text?",
        "What does the picture say?",
        "What does the sign say?",
        "Can you read this?",
    ]
    if scene.text is None:
        return [(rng.choice(forms), NO_TEXT)] if rng.random() < 0.15 else []
    if scene.text.string[0].isdigit():
        forms += ["What number is printed?", "Which number do you see?", "What number is this?"]
    else:
        forms += ["Which letters are printed?", "What letters do you see?", "What word is printed?"]
    return [(rng.choice(forms), scene.text.string)]


def _describe(rng: Random, scene: Scene) -> list[Candidate]:
    forms = [
        "What is in this picture?",
        "Describe the picture.",
        "What do you see?",
        "Describe this image.",
        "What is in this image?",
        "What does the picture show?",
        "What is this?",
        "Describe this picture.",
        "What is in the picture?",
        "What can you see?",
        "What is on the picture?",
    ]
    if scene.shapes:
        forms += ["What shapes are in the picture?", "Which shapes do you see?", "What shapes are there?"]
    return [(rng.choice(forms), describe(scene))]


def describe(scene: Scene) -> str:
    """One sentence that says everything: "A red circle and a blue star on a white background." """
    parts = [_article(_name(shape)) for shape in scene.shapes]
    if scene.text:
        parts.append(f"the text {scene.text.string}")
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{listed[0].upper()}{listed[1:]} on {_article(scene.background)} background."


KINDS: dict[str, Callable[[Random, Scene], list[Candidate]]] = {
    "shape": _shape,
    "colour": _colour,
    "place": _place,
    "count": _count,
    "background": _background,
    "text": _text,
    "describe": _describe,
}
PAIR_KIND = "two pictures"


def _which(first: bool, second: bool) -> str:
    return ("neither", "second", "first", "both")[2 * first + second]


def _pair_has(rng: Random, first: Scene, second: Scene) -> Candidate:
    key: Callable[[Shape], str] = rng.choice([lambda s: s.name, _name])
    there, others = ({key(shape) for shape in scene.shapes} for scene in (first, second))
    everywhere = SHAPES if rng.random() < 0.3 else ()
    what = rng.choice(sorted({*there, *others, *everywhere}) or list(SHAPES))
    form = _pick(
        rng, "Which picture has {a}?", "Which picture shows {a}?", "In which picture is there {a}?", a=_article(what)
    )
    return form, _which(what in there, what in others)


def _pair_more(rng: Random, first: Scene, second: Scene) -> Candidate:
    form = _pick(rng, "Which picture has more shapes?", "Which picture shows more shapes?")
    difference = len(first.shapes) - len(second.shapes)
    return form, "same" if difference == 0 else "first" if difference > 0 else "second"


def _pair_same(rng: Random, first: Scene, second: Scene) -> Candidate:
    form = _pick(
        rng,
        "Do both pictures have the same background?",
        "Is the background the same in both pictures?",
        "Are the backgrounds the same?",
    )
    return form, "yes" if first.background == second.background else "no"


def _pair_one(rng: Random, first: Scene, second: Scene) -> Candidate:
    """A question about one of the two."""
    ordinal, scene = rng.choice([("first", first), ("second", second)])
    where = f"in the {ordinal} picture"
    asked: list[Candidate] = [
        (f"What colour is the background {where}?", scene.background),
        (f"How many shapes are {where}?", str(len(scene.shapes))),
    ]
    asked += [(f"What colour is the {s.name} {where}?", s.colour, s) for s in _only(scene, lambda s: s.name)]
    asked += [(f"What shape is {s.colour} {where}?", s.name, s) for s in _only(scene, lambda s: s.colour)]
    if scene.text:
        asked.append((f"What is written {where}?", scene.text.string))
    return rng.choice(asked)


def _pair_forms(rng: Random) -> list[Callable[[Random, Scene, Scene], Candidate]]:
    return [_pair_has, _pair_has, _pair_more, _pair_same, _pair_one, _pair_one]
