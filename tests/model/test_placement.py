"""Which encoding each tensor gets: wishes, what the file has, and rows that do not divide."""

from dataclasses import replace
from pathlib import Path

import pytest

from pixtral_cli.encoding_choices import find
from pixtral_cli.model.placement import place
from weights_cache.formats.reader import TensorInfo

LAYER = "language_model.layers.0.mlp.up_proj.weight"
NORM = "language_model.norm.weight"
EMBEDDING = "language_model.embed_tokens.weight"
VISION = "vision_tower.layers.0.feed_forward.up_proj.weight"
PATCHES = "vision_tower.patch_conv.weight"


def tensors(encoding="bfloat16", columns=512, **more):
    shapes = {
        LAYER: (64, columns),
        EMBEDDING: (99, columns),
        NORM: (columns,),
        VISION: (32, 256),
        PATCHES: (256, 3, 16, 16),
    }
    encodings = dict.fromkeys(shapes, encoding) | {NORM: "float32"} | more
    return {name: TensorInfo(name, "?", shape, 0, Path("x"), encodings[name]) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q6_k"])
def test_matrices_of_the_text_part_are_packed_and_the_picture_part_is_not(name):
    chosen = place(tensors(), find(name))
    assert (chosen.encodings[LAYER], chosen.encodings[EMBEDDING]) == (name, name)
    assert {chosen.encodings[key] for key in (NORM, VISION, PATCHES)} == {"bfloat16"}
    assert (chosen.label, chosen.dtype, chosen.notes) == (name, "bfloat16", [])


def test_the_picture_part_is_packed_when_asked():
    chosen = place(tensors(), find("q4_k"), quantize_vision=True)
    assert (chosen.encodings[VISION], chosen.encodings[PATCHES]) == ("q4_k", "bfloat16")


@pytest.mark.parametrize(
    ("name", "columns", "neighbour"),
    [("q4_k", 96, "q4_0"), ("q6_k", 96, "q8_0"), ("q4_0", 40, "bfloat16"), ("q4_k", 40, "bfloat16")],
)
def test_rows_that_do_not_divide_take_a_named_neighbour_and_it_is_said_once(name, columns, neighbour):
    chosen = place(tensors(columns=columns), find(name))
    assert (chosen.encodings[LAYER], chosen.encodings[EMBEDDING]) == (neighbour, neighbour)
    assert len(chosen.notes) == 1
    assert all(word in chosen.notes[0] for word in (name, neighbour, str(columns)))


def test_rows_of_several_widths_that_take_one_neighbour_are_one_sentence():
    shapes = {LAYER: (64, 64), EMBEDDING: (99, 96), VISION: (32, 40)}
    several = {name: replace(tensors()[name], shape=shape) for name, shape in shapes.items()}
    chosen = place(several, find("q4_k"), quantize_vision=True)
    assert [chosen.encodings[name] for name in shapes] == ["q4_0", "q4_0", "bfloat16"]
    bfloat16, q4_0 = chosen.notes
    assert "40" in bfloat16 and "bfloat16" in bfloat16
    assert all(word in q4_0 for word in ("64", "96", "q4_k", "q4_0"))


def test_a_packed_file_keeps_its_mixture_unless_another_encoding_is_asked_for():
    mixed = tensors("q4_k", **{EMBEDDING: "q6_k", VISION: "bfloat16", PATCHES: "float16"})
    for wanted in (None, find("q4_k")):
        chosen = place(mixed, wanted)
        assert (chosen.encodings[LAYER], chosen.encodings[EMBEDDING]) == ("q4_k", "q6_k")
        assert (chosen.encodings[PATCHES], chosen.label) == ("bfloat16", "q4_k")
    assert set(place(mixed, find("float32")).encodings.values()) == {"float32"}
    assert place(mixed, find("q6_k")).encodings[LAYER] == "q6_k"


def test_packing_the_picture_part_as_well_keeps_the_mixture_of_a_packed_file():
    mixed = tensors("q4_k", **{EMBEDDING: "bfloat16", VISION: "float16", PATCHES: "float16"})
    chosen = place(mixed, find("q4_k"), quantize_vision=True).encodings
    assert (chosen[EMBEDDING], chosen[VISION], chosen[PATCHES]) == ("bfloat16", "q4_k", "bfloat16")
    packed = place(mixed | {VISION: replace(mixed[VISION], encoding="q8_0")}, find("q4_k"), quantize_vision=True)
    assert (packed.encodings[LAYER], packed.encodings[VISION]) == ("q4_k", "q8_0")


def test_half_precision_files_run_as_bfloat16():
    assert set(place(tensors("float16"), None).encodings.values()) == {"bfloat16"}


def test_nf4_leaves_the_embedding_alone_and_says_nothing_of_it():
    chosen = place(tensors(), find("nf4"))
    assert (chosen.encodings[LAYER], chosen.encodings[EMBEDDING], chosen.notes) == ("nf4", "bfloat16", [])
