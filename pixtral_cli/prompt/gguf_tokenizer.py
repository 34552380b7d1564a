"""A tokenizer as a GGUF's metadata writes it in, a Tokenizer out; knows no files.

Two kinds are known: `gpt2`, a byte-level BPE with its merges and the name of a way to split text, and `llama`, a
SentencePiece BPE with scores. Sources: gguf-py's `constants.py` for the keys, llama.cpp's `llama-vocab.cpp` for what
they mean, HF's tokenizers for how the same is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import tokenizers
from tokenizers import decoders, models, normalizers

from pixtral_cli.prompt.errors import TokenizerUnreadable
from pixtral_cli.prompt.tokenizer import BYTE, SPACE, Control, Tokenizer
from pixtral_cli.prompt.tokenizer_files import byte_level_bpe, every_merge

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE_TYPE = range(1, 7)
HIDDEN = (UNKNOWN, CONTROL)
"""Types of tokens that text never becomes and that show nothing."""

TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS: Mapping[str, tuple[str, bool]] = {
    "tekken": (TEKKEN, True),
    "pixtral": (TEKKEN, True),
    "llama-bpe": (LLAMA3, True),
    "llama3": (LLAMA3, True),
    "llama-v3": (LLAMA3, True),
    "gpt-2": (GPT2, False),
}
"""`tokenizer.ggml.pre` -> (the pattern of a piece of text, whether a piece that is an entry is taken whole).

GGUFs made from mistral-community/pixtral-12b say "pixtral". llama.cpp splits these like Llama 3, after the pattern in
that repository's tokenizer.json; Pixtral was trained with the one in Mistral's tekken.json, which is taken here.
"""


def load(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of the keys under `tokenizer.` and `tokenizer.ggml.`, without these prefixes.

    Raises:
        TokenizerUnreadable: of an unknown kind, or contradicting itself.
    """
    kinds: dict[str, Callable[[_Vocabulary], tokenizers.Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = metadata.get("model")
    if kind is None:
        _refuse("does not say of which kind it is: the key tokenizer.ggml.model is missing")
    if kind not in kinds:
        _refuse(f"is of the kind {str(kind)[:60]!r}, and {' and '.join(kinds)} are known")
    vocabulary = _Vocabulary(metadata)
    try:
        text_model = kinds[kind](vocabulary)
    except TokenizerUnreadable:
        raise
    except Exception as error:  # noqa: BLE001  the library raises bare Exception
        _refuse(f"cannot be built: {error}")
    adds_bos = metadata.get("add_bos_token")
    return Tokenizer(
        text_model,
        vocabulary.controls,
        is_byte_level=kind == "gpt2",
        drops_first_space=kind == "llama" and vocabulary.adds_space,
        bos=vocabulary.control("bos_token_id"),
        eos=vocabulary.control("eos_token_id"),
        adds_bos=adds_bos if isinstance(adds_bos, bool) else kind == "llama" or metadata.get("pre") != "gpt-2",
    )


class _Vocabulary:
    """The lists of the metadata, of one length each; text ids and control tokens apart."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.metadata = metadata
        self.tokens: list[str] = _texts(metadata, "tokens")
        types = metadata.get("token_type", [NORMAL] * len(self.tokens))
        if not isinstance(types, list) or len(types) != len(self.tokens):
            _refuse(f"has {len(self.tokens)} tokens and no type for each")
        entries = list(zip(self.tokens, types, strict=True))
        self.controls = {
            text: Control(text, id, special=type != USER_DEFINED)
            for id, (text, type) in enumerate(entries)
            if type in (*HIDDEN, USER_DEFINED)
        }
        self.ids = {text: id for id, (text, type) in enumerate(entries) if type in (NORMAL, BYTE_TYPE)}
        self.adds_space = bool(metadata.get("add_space_prefix", True))  # before a text
        self.unknown = next((text for text, type in entries if type == UNKNOWN), None)

    def control(self, key: str) -> str | None:
        """The control string whose id stands under `key`."""
        id = self.metadata.get(key)
        text = self.tokens[id] if type(id) is int and 0 <= id < len(self.tokens) else None
        return text if text in self.controls else None


def _byte_level(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    split = vocabulary.metadata.get("pre")
    if split is None:
        _refuse("does not say how it splits text: the key tokenizer.ggml.pre is missing")
    if split not in SPLITS:
        _refuse(f"splits text the way of {str(split)[:60]!r}, and {', '.join(SPLITS)} are known")
    pattern, whole = SPLITS[split]
    ids = vocabulary.ids
    pairs = map(_pair, _texts(vocabulary.metadata, "merges"))
    merges = [(left, right) for left, right in pairs if left in ids and right in ids and left + right in ids]
    return byte_level_bpe(ids, merges, pattern, ignore_merges=whole)


def _pair(merge: str) -> tuple[str, str]:
    """Two entries with a space between; the byte-level alphabet has no space of its own."""
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        _refuse(f"has the merge {merge[:60]!r}, which is no pair")
    return left, right


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    scores = vocabulary.metadata.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        _refuse("has no score for each token")
    best_first = sorted(vocabulary.ids.items(), key=lambda entry: -scores[entry[1]])
    merges = every_merge({text: id for text, id in best_first if not BYTE.fullmatch(text)})
    unknown = vocabulary.unknown
    entries = vocabulary.ids if unknown is None else vocabulary.ids | {unknown: vocabulary.controls[unknown].id}
    bpe = tokenizers.Tokenizer(models.BPE(entries, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", SPACE)
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if vocabulary.adds_space else spaces
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.adds_space else []
    bpe.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return bpe


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    found = metadata.get(key)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        _refuse(f"has no list of texts under {key!r}")
    return found


def _refuse(reason: str) -> NoReturn:
    raise TokenizerUnreadable(
        f"The tokenizer in the GGUF file {reason}.",
        "Give a folder with the model's tokenizer by --model-path, and the GGUF by --weight-path.",
    )
