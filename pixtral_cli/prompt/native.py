"""A conversation in, token ids by Mistral's own rules out, one mark per picture; knows no Jinja and no pixels.

Source: mistral-common `protocol/instruct/normalize.py` and `tokens/tokenizers/instruct.py`. V3 (Pixtral-12B, NeMo)
writes the system text into the last user turn; V7 and later have a turn for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pixtral_cli.prompt.messages import JOIN, Chunk, Conversation, Message, Picture, Text, user_first
from pixtral_cli.prompt.tokenizer import Tokenizer

NEEDED = ("[INST]", "[/INST]")
SYSTEM_TURNS = 7
TEXTS_TOUCH = 15
"""The first versions with system turns, and with nothing between the texts of one message."""


def can_chat(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the control tokens that the rules need."""
    return all(name in tokenizer.controls for name in NEEDED) and tokenizer.eos_id is not None


@dataclass
class NativeRules:
    """Mistral's chat rules of one version, with a tokenizer."""

    tokenizer: Tokenizer

    @property
    def version(self) -> int:
        """What tekken.json says; elsewhere, whether there are control tokens for a system turn."""
        return self.tokenizer.version or (7 if "[SYSTEM_PROMPT]" in self.tokenizer.controls else 3)

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the answer begins; every picture is one image token."""
        ids = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        turns = conversation.merged(apart=("system",)).messages
        system = ""
        if self.version < SYSTEM_TURNS:
            system = JOIN.join(turn.text for turn in turns if turn.role == "system" and turn.text)
            turns = user_first([turn for turn in turns if turn.role != "system"])
        last = max(index for index, turn in enumerate(turns) if turn.role == "user")
        for index, turn in enumerate(turns):
            ids += self._turn(turn, system if index == last else "")
        return ids

    def _turn(self, turn: Message, system: str) -> list[int]:
        control = self.tokenizer.control
        if turn.role == "system":
            return [control("[SYSTEM_PROMPT]"), *self._text(turn.text), control("[/SYSTEM_PROMPT]")]
        if turn.role == "assistant":
            return [*self._text(turn.text.rstrip(" ")), self.tokenizer.eos_id]  # type: ignore[list-item]
        return [control("[INST]"), *self._user(turn, system), control("[/INST]")]

    def _user(self, turn: Message, system: str) -> list[int]:
        """Text alone is tokenised in one with the system text; with pictures, piece by piece."""
        lead = system + JOIN if system else ""
        if not turn.has_pictures:
            return self._text(lead + self._joined(turn.chunks))
        return self._text(lead) + [id for chunk in self._pieces(turn) for id in self._chunk(chunk)]

    def _pieces(self, turn: Message) -> list[Chunk]:
        """Neighbouring texts joined; a single picture at the end of only texts moves to the front."""
        pieces: list[Chunk] = []
        for chunk in turn.chunks:
            if isinstance(chunk, Text) and pieces and isinstance(pieces[-1], Text):
                pieces[-1] = Text(self._joined((pieces[-1], chunk)))
            elif chunk != Text(""):
                pieces.append(chunk)
        if isinstance(pieces[-1], Picture) and all(isinstance(piece, Text) for piece in pieces[:-1]):
            return [pieces[-1], *pieces[:-1]]
        return pieces

    def _joined(self, chunks: tuple[Chunk, ...]) -> str:
        join = "" if self.version >= TEXTS_TOUCH else JOIN
        return join.join(chunk.text for chunk in chunks if isinstance(chunk, Text) and chunk.text)

    def _chunk(self, chunk: Chunk) -> list[int]:
        return [self.tokenizer.control("[IMG]")] if isinstance(chunk, Picture) else self._text(chunk.text)

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else []
