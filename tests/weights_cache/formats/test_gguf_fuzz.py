"""Headers of GGUF files altered at random: a clean error or a file that can be read, and never much memory."""

import math
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from support import format_builders

from weights_cache import checkpoint
from weights_cache.errors import WeightsError
from weights_cache.formats.gguf import Header

EXTREMES = [0, 1, 7, 8, 9, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
ENOUGH = 2_000_000  # bytes; the file itself has some 3,000


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A small whole text model, and the length of what stands before its data."""
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{key}")(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list(["<unk>", "<s>", "[IMG]", "a", "b", "ab"])
    writer.add_token_types([2, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_token_scores([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    writer.add_chat_template("{{ messages }}" * 10)
    for name in ("token_embd", "output", "blk.0.attn_q", "blk.0.ffn_up"):
        writer.add_tensor(f"{name}.weight", np.ones((2, 2), np.float32))
    writer.add_tensor("packed", np.zeros((3, 34), np.uint8), raw_dtype=8)
    format_builders.finish(writer)
    data = path.read_bytes()
    return data, min(entry.begin for entry in Header(path).entries.values())


def mutated(data: bytes, header: int, chance: random.Random) -> bytes:
    """`data` with one to four changes in its first `header` bytes: bits, numbers, pieces doubled or dropped, an end."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if len(changed) < 32:
            break
        at = chance.randrange(min(header, len(changed) - 8))
        match chance.randrange(6):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed[at] = chance.randrange(256)
            case 2:
                struct.pack_into("<Q", changed, at, chance.choice(EXTREMES))
            case 3:
                struct.pack_into("<I", changed, at, chance.choice(EXTREMES) % 2**32)
            case 4:
                changed[at:at] = changed[chance.randrange(header) :][: chance.randrange(64)]
            case 5:
                del changed[at : at + chance.randrange(64)]
        if chance.random() < 0.05:
            del changed[max(24, chance.randrange(len(changed))) :]
    return bytes(changed)


def outcomes(original: tuple[bytes, int], path: Path, seeds: range) -> dict[str, int]:
    """How many of the altered files opened, with all that a loader reads of them, and how many were refused."""
    data, header = original
    seen = {"opened": 0, "refused": 0}
    tracemalloc.start()
    try:
        for seed in seeds:
            path.write_bytes(mutated(data, header, random.Random(seed)))
            tracemalloc.reset_peak()
            try:
                opened = checkpoint.open(path)
                size = path.stat().st_size
                assert all(math.prod(info.shape) <= 8 * size for info in opened.tensors.values())
                seen["opened"] += 1
            except WeightsError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
                seen["refused"] += 1
            assert tracemalloc.get_traced_memory()[1] < ENOUGH, f"seed {seed}"
    finally:
        tracemalloc.stop()
    return seen


def test_300_altered_headers_are_read_or_refused_in_a_sentence(original, tmp_path):
    seen = outcomes(original, tmp_path / "model.gguf", range(300))
    assert seen["refused"] > 150 and seen["opened"] > 10  # the changes reach deep, and are not all fatal


@pytest.mark.slow
def test_10000_altered_headers_are_read_or_refused_in_a_sentence(original, tmp_path):
    outcomes(original, tmp_path / "model.gguf", range(10_000))
