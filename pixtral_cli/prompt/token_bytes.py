"""The spelling of a vocabulary entry in, the bytes that it stands for out; knows no ids and no text encoding."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from tokenizers import Tokenizer

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_letters() -> dict[int, str]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


BYTE_LETTERS = _byte_letters()
LETTER_BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}
TO_LETTERS = {byte: ord(letter) for byte, letter in BYTE_LETTERS.items()}


def spell(data: bytes) -> str:
    """Bytes in the byte-level alphabet.

    >>> spell(b" a")
    'Ġa'
    """
    return data.decode("latin-1").translate(TO_LETTERS)


def byte_level(piece: str) -> bytes:
    """The bytes of a byte-level entry; letters outside the alphabet stand for their own UTF-8."""
    try:
        return bytes(map(LETTER_BYTES.__getitem__, piece))
    except KeyError:
        return piece.encode()


def sentencepiece(piece: str) -> bytes:
    """The bytes of a SentencePiece entry: U+2581 is a space, ``<0x0A>`` the byte 10."""
    if match := BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE, " ").encode()


def speller(tokenizer: Tokenizer) -> tuple[Callable[[str], bytes], bool]:
    """How this tokenizer's entries become bytes, and whether a text's first space is not part of the text."""
    parts = set(_types(_state(tokenizer.decoder))) | set(_types(_state(tokenizer.pre_tokenizer)))
    if "ByteLevel" in parts:
        return byte_level, False
    decoder = set(_types(_state(tokenizer.decoder)))
    return sentencepiece, bool(decoder & {"Strip", "Metaspace"})


def _state(part: object | None) -> object:
    return json.loads(part.__getstate__()) if part is not None else None  # type: ignore[attr-defined]


def _types(state: object) -> list[str]:
    """Every `"type"` in a part's JSON description, however nested."""
    if isinstance(state, dict):
        own = [state["type"]] if isinstance(state.get("type"), str) else []
        return own + [name for value in state.values() for name in _types(value)]
    if isinstance(state, list):
        return [name for value in state for name in _types(value)]
    return []
