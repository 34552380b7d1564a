"""A tekken.json in, an equal `tokenizers` BPE and its control tokens out; knows no templates.

Source of the rules: mistral-common `tokens/tokenizers/tekken.py`, whose ids the tests compare.
"""

from __future__ import annotations

import gc
import json
from binascii import a2b_base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from pixtral_cli.prompt.errors import PromptError, TokenizerUnreadable
from pixtral_cli.prompt.settings import Settings, reason_of
from pixtral_cli.prompt.token_bytes import spell

CONTROLS_BEFORE_V8 = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
    "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""The control tokens in order of id, for files that do not list theirs."""


@dataclass(frozen=True)
class Tekken:
    bpe: Tokenizer
    controls: dict[str, int]
    """Control string -> id, the unnamed ``<SPECIAL_n>`` included."""
    version: int
    """Of the chat rules: 3 for Pixtral-12B."""
    image: Settings
    """``image_patch_size``, ``max_image_size``, ``spatial_merge_size``; nothing for a text model."""


def load(path: Path) -> Tekken:
    """Build the tokenizer of a tekken.json.

    Text ids come after the special ones: id = special count + rank; the file holds more entries than the
    model has, and the surplus is cut off. 131,072 entries take about a second.

    Raises:
        TokenizerUnreadable: the file is no tekken.json.
    """
    try:
        with _no_collection():
            return _build(json.loads(path.read_bytes()), str(path))
    except PromptError:
        raise
    except Exception as error:  # a damaged file can fail anywhere, and `tokenizers` raises bare Exception
        raise TokenizerUnreadable(f"Cannot read {path}: {reason_of(error)}.") from error


def _build(data: dict[str, Any], where: str) -> Tekken:
    config = data["config"]
    special = config["default_num_special_tokens"]
    ranks = _ranks(data["vocab"][: config["default_vocab_size"] - special])
    bpe = Tokenizer(
        models.BPE({piece: special + rank for piece, rank in ranks.items()}, _merges(ranks), ignore_merges=True)
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    settings = Settings(data, where)
    image = settings.section("image" if data.get("image") else "multimodal")
    return Tekken(bpe, _controls(data.get("special_tokens"), special), _version(config["version"]), image)


def _ranks(vocab: list[dict[str, Any]]) -> dict[str, int]:
    return {spell(a2b_base64(entry["token_bytes"])): rank for rank, entry in enumerate(vocab)}


def _merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make an entry of two others, in order of rank.

    A rank-based encoder merges any neighbours whose joint spelling is an entry, lowest rank first; a list of
    all such pairs in that order is the same rule, with no need to find out which of them really happen.
    """
    return [
        (piece[:cut], piece[cut:])
        for piece in ranks
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]


def _controls(listed: list[dict[str, Any]] | None, count: int) -> dict[str, int]:
    if listed is None:
        named = {name: rank for rank, name in enumerate(CONTROLS_BEFORE_V8[:count])}
    else:
        named = {entry["token_str"]: entry["rank"] for entry in listed}
    return named | {f"<SPECIAL_{rank}>": rank for rank in range(len(named), count)}


def _version(text: str) -> int:
    """The number in "v3" or "v13"."""
    return int(text.lstrip("v").partition("m")[0])


@contextmanager
def _no_collection() -> Iterator[None]:
    """The cyclic garbage collector would walk the million new objects again and again: a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
