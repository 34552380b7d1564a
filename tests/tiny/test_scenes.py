"""What is drawn is what the scene says."""

import itertools

import pytest

from pixtral_cli.tiny.scenes import MIN_SPACING, SHAPES, Scene, Shape, Style, draw, random_scene, scene_rng

SCENES = [random_scene(scene_rng(20_000, index)) for index in range(150)]


def test_a_seed_and_a_number_always_give_the_same_picture():
    again = random_scene(scene_rng(20_000, 7))
    assert again == SCENES[7]
    assert draw(again).tobytes() == draw(SCENES[7]).tobytes()
    assert draw(random_scene(scene_rng(20_001, 7))).tobytes() != draw(again).tobytes()


def test_every_shape_has_its_colour_at_its_centre_and_lies_inside_its_cell():
    for scene in SCENES:
        picture = draw(scene)
        for shape in scene.shapes:
            assert picture.getpixel((round(shape.x), round(shape.y))) == shape.rgb
            for centre, side, cell in ((shape.x, scene.width, shape.column), (shape.y, scene.height, shape.row)):
                assert side * cell / 3 <= centre - shape.radius * 0.99
                assert centre + shape.radius * 0.99 <= side * (cell + 1) / 3


def test_sides_are_natural_and_aspects_odd():
    sides = [side for scene in SCENES for side in (scene.width, scene.height)]
    assert min(sides) >= 64 and max(sides) <= 256
    assert any(side % 16 for side in sides)
    assert any(scene.width > 2.5 * scene.height for scene in SCENES)


def test_printed_characters_are_at_least_a_patch_apart_and_inside_the_picture():
    texts = [(scene, scene.text) for scene in SCENES if scene.text]
    assert {len(text.string) for _, text in texts} >= {1, 2, 3, 4, 5}
    for scene, text in texts:
        xs = [x for x, _ in text.centres]
        assert all(right - left >= MIN_SPACING for left, right in itertools.pairwise(xs))
        assert xs[0] - 7 > 0 and xs[-1] + 7 < scene.width


@pytest.mark.parametrize("name", SHAPES)
def test_no_two_shapes_look_alike(name):
    def outline(which: str) -> bytes:
        shape = Shape(which, "red", (255, 0, 0), 1, 1, 48, 48, 14)
        return draw(Scene(96, 96, "white", (255, 255, 255), (shape,))).tobytes()

    assert all(
        sum(a != b for a, b in zip(outline(name), outline(other), strict=True)) > 100
        for other in SHAPES
        if other != name
    )


def test_a_style_of_one_size_draws_that_size():
    scene = random_scene(scene_rng(20_000, 1), Style(size=(100, 70)))
    assert draw(scene).size == (100, 70)
