"""Text events in, server-sent events out: the chunks of OpenAI's streams. Knows no engine and no event loop.

A chunk is put together from prepared text, and only what the model wrote is encoded: at a thousand tokens a second
anything more would be felt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from pixtral_cli.generation import Echo, Reply, TextEvent, TokenLogprob, Usage, characters
from pixtral_cli.prompt.tool_calls import ToolCallDelta, whole_deltas
from pixtral_cli.server import replies
from pixtral_cli.server.replies import Envelope, TokenBytes

DONE = b"data: [DONE]\n\n"
compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""In ASCII: many a client takes U+2028 and its like for the end of a line."""
WHOLE_CALLS = ("mistral-client-", "python-httpx/")
"""How user agents begin of clients that need each call whole, as Mistral's own servers send it. Mistral's packages
refuse a piece without a name. langchain-mistralai, which says that it is httpx, takes each piece for another call.
"""


def takes_pieces(user_agent: str) -> bool:
    """Whether a client can put a call together that comes in pieces, as OpenAI sends it."""
    return not user_agent.startswith(WHOLE_CALLS)


class Chunks:
    """Turns the events of `answers` answers into bytes of a stream.

    With `in_pieces` calls come in pieces, as from OpenAI. Else each call comes whole, and the last choice has the
    usage, as from Mistral.
    """

    def __init__(
        self,
        envelope: Envelope,
        answers: int,
        n: int,
        token_bytes: TokenBytes,
        include_usage: bool,
        usage_in_each: bool = False,
        in_pieces: bool = True,
    ) -> None:
        self.envelope, self.n, self.token_bytes, self.include_usage = envelope, n, token_bytes, include_usage
        self.usage_in_each, self.in_pieces = usage_in_each, in_pieces
        head = compact(envelope.head(chunk=True))[:-1]
        self.head = f'data: {head},"choices":['
        self.tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self.replies: list[Reply | None] = [None] * answers
        self.held: list[list[TokenLogprob]] = [[] for _ in range(answers)]
        self.offsets = [0] * answers
        """Characters of the tokens whose log-probabilities were told."""
        self.is_chat = envelope.kind == "chat"

    def opening(self, first: Sequence[tuple[int, TextEvent]]) -> bytes:
        """A chat's first chunk of each answer, which has the role. The `first` events give the usage of the prompt."""
        if not self.is_chat:
            return b""
        used = replace(first[0][1].usage, completion_tokens=0) if self.usage_in_each else None
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        choices = [f'{{"index":{place},{delta}}}' for place in range(len(self.replies))]
        return "".join(self._chunk(choice, used) for choice in choices).encode()

    def of(self, events: list[tuple[int, TextEvent]]) -> bytes:
        """The chunks of what came together; b"" while nothing can be shown."""
        return "".join(self._event(place, event) for place, event in events).encode()

    def closing(self) -> bytes:
        """After the last event."""
        if not self.include_usage:
            return DONE
        return self._with_usage("", self.usage()).encode() + DONE

    def usage(self) -> replies.Json:
        """Of all answers, when they have ended."""
        return replies.usage([reply.usage for reply in self.replies if reply is not None], self.n)

    def _event(self, place: int, event: TextEvent) -> str:
        used = event.usage if self.usage_in_each else None
        chunks = "".join([self._chunk(choice, used) for choice in self._choices(place, event)])
        if event.finish_reason:
            self.replies[place] = event.reply
            chunks += self._end(place, event.finish_reason, used)
        return chunks

    def _choices(self, place: int, event: TextEvent) -> list[str]:
        """What the event adds to its answer: one choice for each chunk."""
        choices = []
        if event.logprob is not None:
            self.held[place].append(event.logprob)
        if event.echo is not None:
            choices.append(self._echo(place, event.echo))
        if event.text:
            choices.append(self._text(place, event.text))
        deltas = event.tool_call_deltas if self.in_pieces else whole_deltas(event.tool_calls)
        choices += [self._call(place, delta) for delta in deltas]
        if event.finish_reason and self.held[place]:
            choices.append(self._text(place, ""))
        return choices

    def _text(self, place: int, text: str) -> str:
        said = f'"delta":{{"content":{compact(text)}}}' if self.is_chat else f'"text":{compact(text)}'
        return self._said(place, said)

    def _call(self, place: int, delta: ToolCallDelta) -> str:
        told = replies.tool_call_delta(delta)
        calls = {"function_call": told["function"]} if self.envelope.older_calls else {"tool_calls": [told]}
        return self._said(place, f'"delta":{compact(calls)}')

    def _echo(self, place: int, echo: Echo) -> str:
        """The prompt, which comes before the answer."""
        self.offsets[place] = len(echo.text)
        said, logprobs = compact(echo.text), compact(replies.echo_logprobs(echo))
        return f'{{"index":{place},"text":{said},"logprobs":{logprobs},"finish_reason":null}}'

    def _said(self, place: int, said: str) -> str:
        logprobs = self._logprobs(place) if self.held[place] else "null"
        return f'{{"index":{place},{said},"logprobs":{logprobs},"finish_reason":null}}'

    def _end(self, place: int, finish_reason: str, used: Usage | None) -> str:
        """The last chunk of an answer. The last of all answers has their usage, for clients that want calls whole."""
        said = '"delta":{}' if self.is_chat else '"text":""'
        reason = replies.older_reason(finish_reason) if self.envelope.older_calls else finish_reason
        choice = f'{{"index":{place},{said},"logprobs":null,"finish_reason":"{reason}"}}'
        if self.in_pieces or self.include_usage or None in self.replies:
            return self._chunk(choice, used)
        return self._with_usage(choice, self.usage())

    def _logprobs(self, place: int) -> str:
        """Of the tokens since the last chunk."""
        held, self.held[place] = self.held[place], []
        if self.is_chat:
            return compact(replies.chat_logprobs(held, self.token_bytes))
        offset = self.offsets[place]
        self.offsets[place] += sum(characters(self.token_bytes(entry.token_id)) for entry in held)
        return compact(replies.text_logprobs(held, offset, self.token_bytes))

    def _chunk(self, choice: str, used: Usage | None) -> str:
        """`used` is told only where each chunk tells the usage so far."""
        return f"{self.head}{choice}{self.tail}" if used is None else self._with_usage(choice, replies.usage([used], 1))

    def _with_usage(self, choice: str, usage: replies.Json) -> str:
        return f'{self.head}{choice}],"usage":{compact(usage)}}}\n\n'
