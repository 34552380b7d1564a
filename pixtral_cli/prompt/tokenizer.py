"""Text in, token ids out, and ids back to bytes; knows no messages and no templates.

A control string in text is text: only `control` and `split_controls` give control ids, and only a template's
own words and raw prompts go through the latter.
"""

from __future__ import annotations

import codecs
import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from pixtral_cli.prompt import tekken
from pixtral_cli.prompt.errors import FETCH_AGAIN, TextTooLong, TokenizerUnreadable
from pixtral_cli.prompt.settings import Settings, reason_of
from pixtral_cli.prompt.token_bytes import speller

Files = Callable[[str], Path | None]
"""A side file's name -> its path, or None: `Checkpoint.file`."""
BETWEEN_WORDS = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")
PIECE = 16 * 1024
LETTERS_A_TOKEN = 8
"""More than any real text has on average: what is longer for its room is not worth tokenising."""


@dataclass(frozen=True)
class Control:
    """A token that a template writes and text never becomes."""

    text: str
    id: int
    special: bool = True
    """False for one whose text belongs to the answer when the model produces it."""
    lstrip: bool = False
    rstrip: bool = False

    @property
    def pattern(self) -> str:
        return r"\s*" * self.lstrip + re.escape(self.text) + r"\s*" * self.rstrip


@dataclass
class Tokenizer:
    """A byte-level or SentencePiece BPE, whichever file the checkpoint brings."""

    text_model: tokenizers.Tokenizer
    """Encodes text; has no added tokens."""
    controls: dict[str, Control]
    bos: str | None
    """The control string that begins a text; None where the vocabulary has none."""
    eos: str | None
    """The control string that ends an answer."""
    adds_bos: bool = True
    """Whether the tokenizer by itself puts `bos` first."""
    version: int | None = None
    """Of Mistral's chat rules, where the file says it (tekken.json)."""
    image: Settings = field(default_factory=Settings)
    """tekken.json's ``image_patch_size``, ``max_image_size``, ``spatial_merge_size``; nothing where it has none."""
    room: int | None = None
    """The tokens of a text beyond which `encode` gives it up; None encodes it however long it takes."""

    @classmethod
    def load(cls, file: Files) -> Tokenizer:
        """Read tekken.json, or else tokenizer.json.

        Raises:
            TokenizerUnreadable: neither is there, or the one that is cannot be read.
            SettingsUnreadable: tokenizer_config.json is damaged.
        """
        if path := file("tekken.json"):
            text_model, controls, more = _from_tekken(path)
        elif path := file("tokenizer.json"):
            text_model, controls, more = _from_json(path)
        else:
            raise TokenizerUnreadable(
                "The model's folder has neither a tokenizer.json nor a tekken.json.",
                f"{FETCH_AGAIN}, or add its tokenizer file.",
            )
        config = Settings.read(file("tokenizer_config.json"))
        bos, eos = config.token("bos_token", "<s>"), config.token("eos_token", "</s>")
        return cls(text_model, controls, *(name if name in controls else None for name in (bos, eos)), **more)

    @property
    def bos_id(self) -> int | None:
        return None if self.bos is None else self.controls[self.bos].id

    @property
    def eos_id(self) -> int | None:
        return None if self.eos is None else self.controls[self.eos].id

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        """Token ids of plain text; control strings in it are spelled out as text.

        Args:
            at_start: whether nothing stands before `text`: SentencePiece vocabularies may then add a space.

        Raises:
            TextTooLong: it has more tokens than `room`.
        """
        text = _without_surrogates(text)
        ids: list[int] = []
        for piece in _pieces(text) if self._words_stand_alone else [text]:
            if self.room is not None and len(ids) + len(piece) // LETTERS_A_TOKEN > self.room:
                raise TextTooLong(len(text), self.room)
            ids += self._encode(piece, at_start and not ids)
        return ids

    def _encode(self, text: str, at_start: bool) -> list[int]:
        model = self.text_model if at_start else self._inner_model
        encoding = model.encode(text, add_special_tokens=False)
        if self.special_ids.isdisjoint(encoding.ids):
            return encoding.ids
        return [
            id
            for found, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            for id in ([found] if found not in self.special_ids else self._letters(text[start:end]))
        ]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the answer; b"" for control tokens and ids without an entry."""
        control = self._control_of.get(token_id)
        if control is not None:
            return b"" if control.special else control.text.encode()
        piece = self.text_model.id_to_token(token_id)
        return b"" if piece is None else self._spelling[0](piece)

    def label(self, token_id: int) -> str:
        """What a token shows as by itself: a control token by its name, half a character as U+FFFD."""
        control = self._control_of.get(token_id)
        return control.text if control else self.token_bytes(token_id).decode("utf-8", "replace")

    def control(self, text: str) -> int:
        """The id of a control token, e.g. ``"[INST]"``. Raises KeyError where the vocabulary has none."""
        return self.controls[text].id

    def split_controls(self, text: str, but: int | None = None) -> list[str | int]:
        """A template's words cut at its control strings: text, control id, text, … without empty texts.

        The string of the control `but` is text.
        """
        parts: list[str | int] = []
        end = 0
        for match in self._control_pattern.finditer(text):
            if (id := self._controls_by_match(match[0])) != but:
                parts += [text[end : match.start()], id]
                end = match.end()
        return [part for part in (*parts, text[end:]) if part != ""]

    @property
    def drops_first_space(self) -> bool:
        """Whether the space at the beginning of a decoded text is not part of it (SentencePiece)."""
        return self._spelling[1]

    @cached_property
    def vocab_size(self) -> int:
        """Ids with an entry."""
        return len({*self.text_model.get_vocab().values(), *self._control_of})

    def _controls_by_match(self, matched: str) -> int:
        return (self.controls.get(matched) or self.controls[matched.strip()]).id

    def _letters(self, text: str) -> list[int]:
        """The ids of a text letter by letter, for the rare vocabulary whose BPE spells a control token."""
        ids = [id for letter in text for id in self._inner_model.encode(letter, add_special_tokens=False).ids]
        return [id for id in ids if id not in self.special_ids]

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.controls.values(), key=lambda control: -len(control.text))
        return re.compile("|".join(control.pattern for control in longest_first) or "(?!)")

    @cached_property
    def _control_of(self) -> dict[int, Control]:
        return {control.id: control for control in self.controls.values()}

    @cached_property
    def id_limit(self) -> int:
        """Every id with an entry is below it."""
        return max(*self.text_model.get_vocab().values(), *self._control_of) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Control tokens that are no part of an answer's text."""
        return frozenset(control.id for control in self.controls.values() if control.special)

    @cached_property
    def _spelling(self) -> tuple[Callable[[str], bytes], bool]:
        return speller(self.text_model)

    @cached_property
    def _words_stand_alone(self) -> bool:
        """Whether a text can be cut before the space between two words, as in every byte-level vocabulary."""
        before = self.text_model.pre_tokenizer
        return before is not None and [piece for piece, _ in before.pre_tokenize_str("a b")] == ["a", "\u0120b"]

    @cached_property
    def _inner_model(self) -> tokenizers.Tokenizer:
        """The text model for what stands after something else: without a space at the text's start."""
        state = self.text_model.pre_tokenizer and json.loads(self.text_model.pre_tokenizer.__getstate__())
        if '"prepend_scheme": "first"' not in json.dumps(state):
            return self.text_model
        state = json.loads(json.dumps(state).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))
        inner = tokenizers.Tokenizer(self.text_model.model)
        if self.text_model.normalizer:
            inner.normalizer = self.text_model.normalizer
        inner.pre_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_EMPTY | {"pre_tokenizer": state})).pre_tokenizer
        return inner


class ByteStream:
    """Tokens to text, one at a time, never giving half a character.

    The pieces of `push` and `finish` together are the bytes of all tokens decoded at once, with U+FFFD only where
    the model really produced bytes that are no UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = True):
        """`at_start`: whether a text begins here. SentencePiece then means nothing by the first space."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = at_start and tokenizer.drops_first_space

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        data = self._tokenizer.token_bytes(token_id)
        if data and self._drop_space:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What an unfinished character at the very end becomes: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


_EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}


def _from_tekken(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Control], dict[str, Any]]:
    loaded = tekken.load(path)
    controls = {text: Control(text, id) for text, id in loaded.controls.items()}
    return loaded.bpe, controls, {"version": loaded.version, "image": loaded.image}


def _from_json(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Control], dict[str, Any]]:
    try:
        whole = tokenizers.Tokenizer.from_buffer(path.read_bytes().removeprefix(BOM_UTF8))
    except Exception as error:
        raise TokenizerUnreadable(f"Cannot read {path}: {reason_of(error)}.") from error
    text_model = tokenizers.Tokenizer(whole.model)  # shares the model, and has no added tokens
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (value := getattr(whole, part)) is not None:
            setattr(text_model, part, value)
    controls = _controls(whole.get_added_tokens_decoder().items())
    return text_model, controls, {"adds_bos": bool(whole.encode("").ids)}


def _controls(added: Iterable[tuple[int, tokenizers.AddedToken]]) -> dict[str, Control]:
    return {t.content: Control(t.content, id, t.special, t.lstrip, t.rstrip) for id, t in added}


def _pieces(text: str) -> Iterator[str]:
    """`text` cut between words: the time that `tokenizers` takes grows faster than the text."""
    start = 0
    while len(text) - start > PIECE and (cut := BETWEEN_WORDS.search(text, start + PIECE)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _without_surrogates(text: str) -> str:
    """Half a UTF-16 pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
