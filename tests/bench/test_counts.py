"""What a work needs is what sizes and encodings say, by arithmetic of its own."""

import pytest

from pixtral_cli.bench.counts import Counts, Need
from pixtral_cli.bench.random_weights import RandomCheckpoint
from pixtral_cli.bench.shapes import config_of
from pixtral_cli.model.families import read_config

LAYER = 2048 * 2048 + 2 * 1024 * 2048 + 2048 * 2048 + 3 * 8192 * 2048
MATRICES, HEAD = 16 * LAYER, 131072 * 2048
NORMS = (2 * 16 + 1) * 2048 * 2
TOKEN = 16 * 2 * 8 * 128 * 2
"""Of the shape `1b`: weights of a layer's matrices, of all, of the head; bytes of norms, and of a token's keys and
values in bfloat16."""
BYTES = {"q4_k": 144 / 256, "q6_k": 210 / 256, "q4_0": 18 / 32, "q8_0": 34 / 32, "bfloat16": 2.0, "nf4": 4.5 / 8}


def counts(shape, encoding, sees=False):
    raw = config_of(shape, sees)
    config = read_config(raw)
    return Counts(config, RandomCheckpoint(raw, config, encoding).tensors)


@pytest.mark.parametrize("encoding", BYTES)
def test_a_prompt_reads_each_weight_once_and_writes_its_keys_and_values(encoding):
    need = counts("1b", encoding).prefill(512)
    assert need.nbytes == (MATRICES + HEAD) * BYTES[encoding] + NORMS + 512 * TOKEN
    attention = 16 * 2 * 16 * 128 * (512 * 513 // 2)
    assert need.multiplications == 512 * MATRICES + HEAD + attention


def test_each_decoded_token_reads_the_weights_and_all_that_came_before():
    need = counts("1b", "q4_k").decode(16, 3, 2)
    seen = 2 * (17 + 18 + 19)
    assert need.nbytes == 3 * ((MATRICES + HEAD) * 144 // 256 + NORMS) + (seen + 3 * 2) * TOKEN
    assert need.multiplications == 3 * 2 * (MATRICES + HEAD) + 16 * 2 * 16 * 128 * seen


def test_of_tied_tables_the_head_is_read():
    """3072 numbers, 26 layers, 32 query heads of 128, feed-forward 9216."""
    layer = 2 * 4096 * 3072 + 2 * 1024 * 3072 + 3 * 9216 * 3072
    need = counts("3b", "bfloat16").decode(0, 1, 1)
    assert need.nbytes == 2 * (26 * layer + 131072 * 3072 + (2 * 26 + 1) * 3072) + 2 * 26 * 2 * 8 * 128 * 2


def test_a_picture_goes_through_the_tower_and_the_projector():
    need, patches = counts("1b", "q4_k", sees=True).picture(1024, 768), 64 * 48
    layer = 4 * 1024 * 1024 + 3 * 1024 * 4096
    weights = 3 * 16 * 16 * 1024 + 24 * layer + 1024 * 2048 + 2048 * 2048
    assert need.multiplications == patches * (weights + 24 * 2 * patches * 1024)
    vectors = (2 * 24 + 1) * 1024 + 2 * 2048
    assert need.nbytes == 2 * (weights + vectors)


def test_a_picture_whose_patches_are_merged_goes_through_the_projector_by_its_tokens():
    need, patches, tokens = counts("small-24b", "q4_k", sees=True).picture(1036, 784), 74 * 56, 37 * 28
    tower = 3 * 14 * 14 * 1024 + 24 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    projector = 4 * 1024 * 1024 + 1024 * 5120 + 5120 * 5120
    assert need.multiplications == patches * (tower + 24 * 2 * patches * 1024) + tokens * projector
    assert need.nbytes == 2 * (tower + projector + (2 * 24 + 2) * 1024)


def test_the_least_time_is_that_of_the_slower_of_the_two():
    assert Need(1000, 10).seconds(100.0, 1000.0) == 10.0
    assert Need(10, 1000).seconds(100.0, 1000.0) == 2.0


def test_a_window_bounds_what_is_seen():
    raw = config_of("1b") | {"sliding_window": 4, "num_hidden_layers": 1}
    config = read_config(raw)
    windowed = Counts(config, RandomCheckpoint(raw, config, "q4_k").tensors)
    per_token = 2 * 8 * 128 * 2
    assert windowed.decode(10, 2, 1).nbytes - windowed.decode(0, 2, 1).nbytes == ((4 + 4) - (1 + 2)) * per_token
