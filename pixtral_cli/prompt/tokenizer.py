"""Text in, token ids out, and the ids of an answer back to text, as they come; knows no files and no templates.

A control string in text is text: only `control` and `split_controls` give control ids, and only a template's
own words and raw prompts go through the latter. An answer's way back is `token_bytes`, `ByteStream`, `StopMatcher`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import tokenizers

from pixtral_cli.prompt.errors import TextTooLong
from pixtral_cli.prompt.model_settings import NO_SETTINGS, SettingsRules

SPACE = "\u2581"
"""How a SentencePiece vocabulary spells a space."""
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How a SentencePiece vocabulary spells a byte that is no character."""
BETWEEN_WORDS = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")
PART_LENGTH = 16 * 1024
LETTERS_A_TOKEN = 8
"""More than any real text has on average: what is longer for its room is not worth tokenising."""
TextOrId = str | int
"""A part of a prompt: plain text, or the id of a control token."""


def _byte_letters() -> dict[int, str]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


BYTE_LETTERS = _byte_letters()
LETTER_BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}


def byte_level(data: bytes) -> str:
    """How a byte-level vocabulary spells these bytes.

    >>> byte_level(b" a")
    'Ġa'
    """
    return data.decode("latin-1").translate(BYTE_LETTERS)  # latin-1: one character for each byte, of the same number


@dataclass(frozen=True)
class Control:
    """A token that a template writes and text never becomes."""

    text: str
    id: int
    special: bool = True
    """False for one whose text belongs to the answer when the model produces it."""
    lstrip: bool = False
    rstrip: bool = False
    """Whether blanks before and after it are part of it."""


@dataclass
class Tokenizer:
    """A byte-level or SentencePiece BPE, whichever file the checkpoint brings."""

    text_model: tokenizers.Tokenizer
    """Encodes text at the start; has no added tokens."""
    controls: dict[str, Control]
    """By their text."""
    is_byte_level: bool = True
    """Whether entries are spelled in GPT-2's alphabet, and not as SentencePiece does."""
    drops_first_space: bool = False
    """Whether the space at the beginning of a decoded text is not part of it (SentencePiece)."""
    inner_model: tokenizers.Tokenizer | None = None
    """Encodes what stands after something else, where `text_model` puts a space before a text; else None."""
    bos: str | None = None
    """The control string that begins a text; None where the vocabulary has none."""
    eos: str | None = None
    """The control string that ends an answer."""
    adds_bos: bool = True
    """Whether the tokenizer by itself puts `bos` first."""
    version: int | None = None
    """Of Mistral's chat rules, where the file says it (tekken.json): 3 for Pixtral-12B."""
    settings_rules: SettingsRules = NO_SETTINGS
    """Which settings prompts tell, where the file says it."""
    longest_side: int | None = None
    """Pixels of the longest side of an image, where the file says it."""
    room: int | None = None
    """The tokens of a text beyond which `encode` gives it up; None encodes it however long it takes."""

    @property
    def bos_id(self) -> int | None:
        return None if self.bos is None else self.controls[self.bos].id

    @property
    def eos_id(self) -> int | None:
        return None if self.eos is None else self.controls[self.eos].id

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        """Token ids of plain text; control strings in it are spelled out as text.

        Half a UTF-16 pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD.

        Args:
            at_start: whether nothing stands before `text`: SentencePiece vocabularies may then add a space.

        Raises:
            TextTooLong: it has more tokens than `room`.
        """
        inner_model = self.inner_model or self.text_model
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        ids: list[int] = []
        for part in _parts(text) if self._words_stand_alone else [text]:
            if self.room is not None and len(ids) + len(part) // LETTERS_A_TOKEN > self.room:
                raise TextTooLong(len(text), self.room)
            model = self.text_model if at_start and not ids else inner_model
            found = model.encode(part, add_special_tokens=False)
            ids += found.ids if self.special_ids.isdisjoint(found.ids) else self._without_controls(part, found)
        return ids

    def encode_with_controls(self, parts: Sequence[TextOrId], *, apart: bool = False) -> list[int]:
        """Token ids of a prompt that is made of plain texts and ids of control tokens.

        Args:
            apart: whether each text is encoded as if nothing stood before it.

        Raises:
            TextTooLong: a text has more tokens than `room`, or all of them together have many more. A few more are
                encoded, so that the engine can say how many tokens there are.
        """
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            if self.room is not None and len(ids) > self.room + PART_LENGTH:
                raise TextTooLong(sum(len(each) for each in parts if isinstance(each, str)), self.room)
            if part:
                ids += self.encode(part, at_start=apart or not ids)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the answer; b"" for control tokens and ids without an entry."""
        data = self._bytes_of.get(token_id)
        if data is None:
            data = self._bytes_of[token_id] = self._spelled(token_id)
        return data

    def _spelled(self, token_id: int) -> bytes:
        control = self._control_of.get(token_id)
        if control is not None:
            return b"" if control.special else control.text.encode()
        entry = self.text_model.id_to_token(token_id) or ""
        if self.is_byte_level:
            try:
                return bytes(map(LETTER_BYTES.__getitem__, entry))
            except KeyError:  # letters outside the alphabet stand for themselves
                return entry.encode()
        if match := BYTE.fullmatch(entry):
            return bytes([int(match[1], 16)])
        return entry.replace(SPACE, " ").encode()

    def label(self, token_id: int) -> str:
        """What a token shows as by itself: a control token by its name, half a character as U+FFFD."""
        control = self._control_of.get(token_id)
        return control.text if control else self.token_bytes(token_id).decode("utf-8", "replace")

    def control(self, text: str) -> int:
        """The id of a control token, e.g. ``"[INST]"``. Raises KeyError where the vocabulary has none."""
        return self.controls[text].id

    def split_controls(self, text: str, but: int | None = None) -> list[TextOrId]:
        """A template's words cut at its control strings: text, control id, text, … without empty texts.

        The string of the control `but` is text.
        """
        parts: list[TextOrId] = []
        end = 0
        for match in self._control_pattern.finditer(text):
            control = self.controls.get(match[0]) or self.controls[match[0].strip()]
            if control.id != but:
                parts += [text[end : match.start()], control.id]
                end = match.end()
        return [part for part in (*parts, text[end:]) if part != ""]

    @cached_property
    def id_limit(self) -> int:
        """Every id with an entry is below it."""
        return max(*self.text_model.get_vocab().values(), *self._control_of) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Control tokens that are no part of an answer's text."""
        return frozenset(control.id for control in self.controls.values() if control.special)

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        """Of the tokens that were asked for."""
        return {}

    @cached_property
    def _control_of(self) -> dict[int, Control]:
        return {control.id: control for control in self.controls.values()}

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.controls.values(), key=lambda control: -len(control.text))
        patterns = [r"\s*" * c.lstrip + re.escape(c.text) + r"\s*" * c.rstrip for c in longest_first]
        return re.compile("|".join(patterns) or "(?!)")

    @cached_property
    def _words_stand_alone(self) -> bool:
        """Whether a text can be cut before the space between two words, as in every byte-level vocabulary."""
        before = self.text_model.pre_tokenizer
        return before is not None and [word for word, _ in before.pre_tokenize_str("a b")] == ["a", "\u0120b"]

    def _without_controls(self, text: str, found: tokenizers.Encoding) -> list[int]:
        """The ids that were found, with letters in place of control tokens, for the rare BPE that spells one."""
        ids: list[int] = []
        for id, (start, end) in zip(found.ids, found.offsets, strict=True):
            if id not in self.special_ids:
                ids.append(id)
                continue
            for letter in text[start:end]:
                spelled = (self.inner_model or self.text_model).encode(letter, add_special_tokens=False).ids
                ids += [other for other in spelled if other not in self.special_ids]
        return ids


class ByteStream:
    """Tokens to text, one at a time, never giving half a character.

    What `push` and `finish` give is, together, the bytes of all tokens decoded at once, with U+FFFD only where the
    model really produced bytes that are no UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = True):
        """`at_start`: whether a text begins here. SentencePiece then means nothing by the first space."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = at_start and tokenizer.drops_first_space
        self._is_within = False  # a character, of which the decoder has the beginning

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        data = self._tokenizer.token_bytes(token_id)
        if data and self._drop_space:
            self._drop_space = False
            data = data.removeprefix(b" ")
        if data.isascii() and not self._is_within:
            return data.decode("ascii")
        text = self._decoder.decode(data)
        self._is_within = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        """What an unfinished character at the very end becomes: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Find the first of several stop strings in streamed text, however it is cut.

    The first stop is the one that is complete first; of two complete at once, the longer. Neither it nor what follows
    is shown. Text that might be the beginning of a stop is held back until it is decided.

    >>> matcher = StopMatcher(["END"])
    >>> matcher.push("the E"), matcher.push("Nd"), matcher.push(" END x")
    (('the ', False), ('ENd', False), (' ', True))
    """

    def __init__(self, stops: Iterable[str] = ()):
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.rest = ""
        """What came with the end of the stop that was met, and after it."""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next text; give what is now safe to show, and whether a stop was met."""
        if self._stopped:
            return "", True
        if not self._stops:
            return text, False
        text = self._held + text
        if found := [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]:
            end, start = min(found)
            self._held, self._stopped, self.rest = "", True, text[end:]
            return text[:start], True
        safe = min(_begin(stop, text) for stop in self._stops)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        held, self._held = self._held, ""
        return held


def _begin(stop: str, text: str) -> int:
    """Where in `text`, which does not contain it, a beginning of `stop` stands at the end; else its length."""
    start = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) if start < 0 else start


def _parts(text: str) -> Iterator[str]:
    """`text` cut between words: the time that `tokenizers` takes grows faster than the text."""
    start = 0
    while len(text) - start > PART_LENGTH and (cut := BETWEEN_WORDS.search(text, start + PART_LENGTH)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
