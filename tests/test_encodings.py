"""What the plan says of encodings, without the codecs, is true of them; sizes are gguf-py's."""

import gguf
import pytest

from pixtral_cli.encoding_choices import CHOICES
from weights_cache import codecs
from weights_cache.encodings import ENCODINGS

SIZES = {kind.name.lower(): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
SIZES |= {"float32": SIZES["f32"], "float16": SIZES["f16"], "bfloat16": SIZES["bf16"]}


@pytest.mark.parametrize("name", sorted(ENCODINGS.keys() - {"nf4", "fp8"}))
def test_the_plan_counts_the_bits_that_are_stored(name):
    block, nbytes = SIZES[name]
    assert (ENCODINGS[name].block, ENCODINGS[name].bits) == (block, 8 * nbytes / block)


@pytest.mark.parametrize("name", CHOICES)
def test_what_can_be_asked_for_can_be_encoded_and_so_can_its_neighbours(name):
    for columns in (1, 32, 256):
        neighbour = ENCODINGS[name].for_width(columns)
        assert columns % neighbour.block == 0
        assert neighbour.name in (*codecs.ENCODERS, "nf4", "fp8")


def test_the_table_has_every_codec_and_each_encodings_neighbour_can_be_encoded():
    assert set(ENCODINGS) == {*codecs.NAMES, "nf4", "fp8"}
    for encoding in ENCODINGS.values():
        assert encoding.fallback is None or encoding.fallback in codecs.ENCODERS
