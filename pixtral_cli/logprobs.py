"""Token ids and scores in, tokens with their texts and log-probabilities out: of answers and of echoed prompts.

Runs no model and writes no JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from pixtral_cli.prompt.tokenizer import ByteStream

if TYPE_CHECKING:
    from pixtral_cli.engine.request import TokenScores
    from pixtral_cli.prompt.processor import Prompt
    from pixtral_cli.prompt.tokenizer import Tokenizer

Label = Callable[[int], str]
"""A token id -> the text that the token is shown as."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its text (bytes that are no whole character show as U+FFFD) and natural log-probability.

    The first token of a prompt has no log-probability.
    """

    token_id: int
    token: str
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(
        cls, token_id: int, logprob: float | None, alternatives: Iterable[tuple[int, float]], label: Label
    ) -> TokenLogprob:
        top = tuple(cls(other, label(other), score) for other, score in alternatives)
        return cls(token_id, label(token_id), logprob, top)


@dataclass(frozen=True, eq=False)
class Echo:
    """A prompt that is repeated before its answer.

    `text` is the prompt as it was written; of one that was given as tokens, what they spell, control tokens left out.
    `scores` are the engine's, of all tokens but the first; None if they were not asked for.
    """

    text: str
    token_ids: list[int]
    tokenizer: Tokenizer
    scores: tuple[TokenScores, ...] | None = None

    @classmethod
    def of(cls, prompt: Prompt, tokenizer: Tokenizer) -> Echo:
        text = _spelled(prompt.token_ids, tokenizer) if prompt.text is None else prompt.text
        return cls(text, prompt.token_ids, tokenizer)

    @cached_property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Of every token. They are made when first asked for: of a long prompt that takes a while."""
        if self.scores is None:
            return None
        ids, label = self.token_ids, cache(self.tokenizer.label)
        told = [TokenLogprob.of(ids[0], None, (), label)]
        for scores in self.scores:
            for logprob, *best in zip(*(each.tolist() for each in scores), strict=True):
                told.append(TokenLogprob.of(ids[len(told)], logprob, zip(*best, strict=True), label))
        return told

    @property
    def offsets(self) -> list[int]:
        """Where in `text` each token begins."""
        offsets = [0]
        for token_id in self.token_ids:
            offsets.append(offsets[-1] + self._width(token_id, offsets[-1]))
        return [min(offset, len(self.text)) for offset in offsets[:-1]]

    def _width(self, token_id: int, at: int) -> int:
        """Characters that begin in the token at the place `at`: none in a control token that the text does not show."""
        data = self.tokenizer.token_bytes(token_id)
        if not data:
            label = self.tokenizer.label(token_id)
            return len(label) if self.text.startswith(label, at) else 0
        if at == 0 and self.tokenizer.drops_first_space and not self.text.startswith(" "):
            data = data.removeprefix(b" ")
        return characters(data)


def characters(data: bytes) -> int:
    """How many characters begin in these bytes of UTF-8; of a character cut in two, the second half begins none."""
    return sum(byte & 0xC0 != 0x80 for byte in data)


def _spelled(token_ids: list[int], tokenizer: Tokenizer) -> str:
    stream = ByteStream(tokenizer)
    return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()
