"""Every answer is the one right answer, checked on a scene made by hand."""

import re

import pytest

from pixtral_cli.tiny.questions import KINDS, ask, ask_pair
from pixtral_cli.tiny.scenes import Printed, Scene, Shape, scene_rng


def shape(name: str, colour: str, row: int, column: int) -> Shape:
    return Shape(name, colour, (1, 2, 3), row, column, 16 + 32 * column, 16 + 32 * row, 12)


LETTERS = Printed("KQ", 20, ((30, 80), (50, 80)), (0, 0, 0), 2)
WHITE = (250, 250, 250)
THREE = Scene(
    96,
    96,
    "white",
    WHITE,
    (shape("circle", "red", 0, 0), shape("star", "green", 0, 1), shape("circle", "blue", 1, 2)),
    LETTERS,
)
ONE = Scene(96, 96, "navy", (22, 30, 85), (shape("cross", "pink", 2, 1),))

# question, without marks and capitals -> answer about THREE; "-" must never be asked
KNOWN = {
    "shape": {
        "what shape is green": "star",
        "what is in the top left": "a red circle",
        "is there a square": "no",
        "is there a green star": "yes",
        "is there a star": "yes",
        "what is in the middle": "nothing",
        "what shape is in the middle right": "circle",
        "what shape is this": "-",
        "what is in the bottom left": "-",
    },
    "colour": {
        "what colour is the star": "green",
        "what colour is the circle": "-",
        "what colour is it": "-",
        "what colour is the shape in the middle right": "blue",
        "is there anything pink": "no",
        "is any shape blue": "yes",
    },
    "place": {
        "where is the star": "top middle",
        "where is the blue shape": "middle right",
        "where is the circle": "-",
        "where is the red circle": "top left",
        "where is it": "-",
    },
    "count": {
        "how many shapes are there": "3",
        "how many circles are there": "2",
        "how many red shapes are there": "1",
        "count the crosses": "0",
    },
    "background": {"what colour is the background": "white"},
    "text": {"what does it say": "KQ", "what number is printed": "-", "which letters are printed": "KQ"},
    "describe": {
        "what is in this picture": "A red circle, a green star, a blue circle and the text KQ on a white background.",
    },
}


def everything_asked(scene: Scene, kind: str, times: int = 2500) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    rng = scene_rng(20_000, 0, "test")
    for _ in range(times):
        if asked := ask(rng, scene, kind):
            plain = re.sub(r"[?.]", "", asked.text).lower().replace("color", "colour")
            found.setdefault(plain, set()).add(asked.answer)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_questions_about_a_scene_have_one_right_answer(kind):
    asked = everything_asked(THREE, kind)
    assert all(len(answers) == 1 for answers in asked.values())
    for question, answer in KNOWN[kind].items():
        assert asked.get(question, {"-"}) == {answer}, question


def test_a_lone_shape_may_be_asked_about_without_naming_it():
    assert everything_asked(ONE, "shape")["what shape is this"] == {"cross"}
    assert everything_asked(ONE, "colour")["what colour is it"] == {"pink"}
    assert everything_asked(ONE, "place")["where is the shape"] == {"bottom middle"}
    assert everything_asked(ONE, "text")["what does it say"] == {"no text"}


def test_questions_over_two_pictures_know_which_is_which():
    rng = scene_rng(20_000, 0, "test")
    asked = {}
    for _ in range(3000):
        pair = ask_pair(rng, THREE, ONE)
        asked[re.sub(r"[?.]", "", pair.text).lower().replace("color", "colour")] = pair.answer
    assert asked["which picture has a star"] == "first"
    assert asked["which picture has a pink cross"] == "second"
    assert asked["which picture has a square"] == "neither"
    assert asked["which picture has more shapes"] == "first"
    assert asked["are the backgrounds the same"] == "no"
    assert asked["how many shapes are in the second picture"] == "1"
    assert asked["what is written in the first picture"] == "KQ"
    assert "what colour is the circle in the first picture" not in asked
