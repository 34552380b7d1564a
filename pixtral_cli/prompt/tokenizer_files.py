"""A checkpoint's tokenizer files in, a Tokenizer out: tekken.json, or else tokenizer.json. Knows no templates.

Source of tekken.json's rules: mistral-common `tokens/tokenizers/tekken.py`, whose ids the tests compare.
"""

from __future__ import annotations

import copy
import gc
import json
import re
from binascii import a2b_base64
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from pixtral_cli.errors import reason_of
from pixtral_cli.prompt.errors import PromptError, TokenizerUnreadable
from pixtral_cli.prompt.model_settings import SettingsRules
from pixtral_cli.prompt.side_file import SideFile
from pixtral_cli.prompt.tokenizer import Control, Tokenizer, byte_level
from weights_cache.wording import FETCH_AGAIN

Files = Callable[[str], Path | None]
"""A side file's name -> its path, or None: `Checkpoint.file`."""
CONTROLS_BEFORE_V8 = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
    "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""The control tokens in order of id, for a tekken.json that does not list its own."""
VERSIONS = (1, 2, 3, 7, 11, 13, 15)
"""Of Mistral's chat rules, all that there are."""
FIRST, NEVER = b'"prepend_scheme":"first"', b'"prepend_scheme":"never"'
"""Of a Metaspace: whether it puts a space before a text."""


def load(file: Files) -> Tokenizer:
    """The tokenizer of tekken.json or tokenizer.json, with the names of BOS and EOS from tokenizer_config.json.

    Raises:
        TokenizerUnreadable: neither is there, or the one that is cannot be read.
        SideFileUnreadable: tokenizer_config.json is damaged.
    """
    path = file("tekken.json")
    read = _from_tekken if path else _from_json
    path = path or file("tokenizer.json")
    if path is None:
        raise TokenizerUnreadable(
            "The model's folder has neither a tokenizer.json nor a tekken.json.",
            f"{FETCH_AGAIN}, or add its tokenizer file.",
        )
    try:
        with _no_garbage_collection():
            tokenizer = read(path)
    except PromptError:
        raise
    except Exception as error:
        raise TokenizerUnreadable(f"Cannot read {path}: {reason_of(error)}.") from error
    config = SideFile.read(file("tokenizer_config.json"))
    bos, eos = config.token("bos_token", "<s>"), config.token("eos_token", "</s>")
    known = tokenizer.controls
    return replace(tokenizer, bos=bos if bos in known else None, eos=eos if eos in known else None)


def byte_level_bpe(
    ids: Mapping[str, int], merges: list[tuple[str, str]], pattern: str, ignore_merges: bool
) -> tokenizers.Tokenizer:
    """A BPE on bytes, of text that is first split by `pattern`.

    `ignore_merges`: whether a part of the text that is an entry is taken whole, however it would be merged.
    """
    bpe = tokenizers.Tokenizer(models.BPE(dict(ids), merges, ignore_merges=ignore_merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    return bpe


def every_merge(entries: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every way to make an entry of two others, in the order of the entries.

    An encoder by rank (tiktoken's) or by score (SentencePiece's) merges any neighbours whose joint spelling is an
    entry, the best one first. A list of all such pairs in that order is the same rule, with no need to find out which
    of them really happen.
    """
    return [
        (entry[:cut], entry[cut:])
        for entry in entries
        for cut in range(1, len(entry))
        if entry[:cut] in entries and entry[cut:] in entries
    ]


def _from_tekken(path: Path) -> Tokenizer:
    """The ids of text come after the special ones: special count + rank. The file holds more entries than the model
    has, and the surplus is cut off. 131,072 entries take about a second."""
    data = json.loads(path.read_bytes())
    config = data["config"]
    special = config["default_num_special_tokens"]
    entries = data["vocab"][: config["default_vocab_size"] - special]
    ids = {byte_level(a2b_base64(entry["token_bytes"])): special + rank for rank, entry in enumerate(entries)}
    if (listed := data.get("special_tokens")) is None:
        controls = {name: rank for rank, name in enumerate(CONTROLS_BEFORE_V8[:special])}
    else:
        controls = {entry["token_str"]: entry["rank"] for entry in listed}
    controls |= {f"<SPECIAL_{rank}>": rank for rank in range(len(controls), special)}
    whole = SideFile(data, str(path))
    image = whole.section("multimodal" if data.get("multimodal") else "image")  # as mistral-common chooses
    return Tokenizer(
        byte_level_bpe(ids, every_merge(ids), config["pattern"], ignore_merges=True),
        {text: Control(text, id) for text, id in controls.items()},
        version=_version(config["version"], path),
        settings_rules=SettingsRules.of(whole.section("model_settings_builder")),
        longest_side=image.length("max_image_size") if "max_image_size" in image else None,
    )


def _version(written: str, path: Path) -> int:
    """The number in "v3", "v13" or "v3m1"."""
    number = written.removeprefix("v").partition("m")[0]
    if not number.isdecimal() or int(number) not in VERSIONS:
        known = ", ".join(f"v{version}" for version in VERSIONS)
        raise TokenizerUnreadable(
            f"{path} is of version {written[:20]!r}, and {known} are known.",
            "A newer pixtral may know it.",
        )
    return int(number)


def _from_json(path: Path) -> Tokenizer:
    whole = tokenizers.Tokenizer.from_buffer(path.read_bytes().removeprefix(BOM_UTF8))
    text_model = _without_added_tokens(whole)
    before, decoder = (
        part.__getstate__() if part is not None else b"" for part in (whole.pre_tokenizer, whole.decoder)
    )  # as JSON without blanks
    is_byte_level = b'"type":"ByteLevel"' in before + decoder
    inner_model = None
    if FIRST in before:
        inner_model = _without_added_tokens(whole)
        pre_tokenizer = copy.copy(whole.pre_tokenizer)
        pre_tokenizer.__setstate__(before.replace(FIRST, NEVER))
        inner_model.pre_tokenizer = pre_tokenizer
    added = whole.get_added_tokens_decoder().items()
    return Tokenizer(
        text_model,
        {t.content: Control(t.content, id, t.special, t.lstrip, t.rstrip) for id, t in added},
        is_byte_level=is_byte_level,
        drops_first_space=not is_byte_level and re.search(rb'"type":"(Strip|Metaspace)"', decoder) is not None,
        inner_model=inner_model,
        adds_bos=bool(whole.encode("").ids),
    )


def _without_added_tokens(whole: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Shares the vocabulary."""
    model = tokenizers.Tokenizer(whole.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (value := getattr(whole, part)) is not None:
            setattr(model, part, value)
    return model


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The cyclic collector would walk a million new objects again and again: a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
