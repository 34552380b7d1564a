"""Replies and text events in, OpenAI's JSON of answers out, whole, or as a stream for as long as its client stays.

Knows no route and no engine. A chunk is put together from prepared text, and only what the model wrote is encoded: at a
thousand tokens a second anything more would be felt.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pixtral_cli import generation
from pixtral_cli.generation import Echo, Reply, TextEvent, TokenLogprob, characters
from pixtral_cli.prompt import tool_calls, tools
from pixtral_cli.server import response_schemas as schemas
from pixtral_cli.server.errors import ApiError, remember
from pixtral_cli.server.metrics import Metrics
from pixtral_cli.server.service import Events
from pixtral_cli.server.wire import AnswerRequest

LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot come: JSON has no infinities."""
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
TokenBytes = Callable[[int], bytes]
Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"
compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""In ASCII: many a client takes U+2028 and its like for the end of a line."""
WHOLE_CALLS = ("mistral-client-", "python-httpx/")
"""How user agents begin of clients that need each call whole, as Mistral's own servers send it. Mistral's packages
refuse a piece without a name. langchain-mistralai, which says that it is httpx, takes each piece for another call.
"""


@dataclass(frozen=True)
class Envelope:
    """What every part of the answer to `request` carries."""

    request: AnswerRequest
    model: str
    fingerprint: str
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def head(self) -> schemas.AnswerHead:
        return {
            "id": f"{'chatcmpl' if self.request.kind == 'chat' else 'cmpl'}-{self.number}",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def answer(
    envelope: Envelope, replies: Sequence[Reply], token_bytes: TokenBytes
) -> schemas.ChatCompletion | schemas.Completion:
    """A whole answer; `replies` in the order of the prompts, `n` to each."""
    request, used = envelope.request, usage([reply.usage for reply in replies], envelope.request.n)
    if request.kind == "text":
        texts = [text_choice(index, reply, token_bytes) for index, reply in enumerate(replies)]
        return {"object": "text_completion", **envelope.head, "choices": texts, "usage": used}
    choices = [chat_choice(index, reply, token_bytes, request.older_calls) for index, reply in enumerate(replies)]
    return {"object": "chat.completion", **envelope.head, "choices": choices, "usage": used}


def chat_choice(index: int, reply: Reply, token_bytes: TokenBytes, older_calls: bool) -> schemas.ChatChoice:
    message: schemas.ChatMessage = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.reasoning_content:
        message["reasoning_content"] = reply.reasoning_content
    if reply.tool_calls:
        message["content"] = reply.text or None
    if reply.tool_calls and older_calls:
        message["function_call"] = tool_call(reply.tool_calls[0])["function"]
    elif reply.tool_calls:
        message["tool_calls"] = [tool_call(call) for call in reply.tool_calls]
    return {
        "index": index,
        "message": message,
        "logprobs": None if reply.logprobs is None else chat_logprobs(reply.logprobs, token_bytes),
        "finish_reason": older_reason(reply.finish_reason) if older_calls else reply.finish_reason,
    }


def older_reason(finish_reason: schemas.FinishReason) -> schemas.FinishReason:
    return "function_call" if finish_reason == "tool_calls" else finish_reason


def text_choice(index: int, reply: Reply, token_bytes: TokenBytes) -> schemas.TextChoice:
    echoed = "" if reply.echo is None else reply.echo.text
    logprobs = None if reply.logprobs is None else text_logprobs(reply.logprobs, len(echoed), token_bytes, reply.echo)
    return {"index": index, "text": echoed + reply.text, "logprobs": logprobs, "finish_reason": reply.finish_reason}


def tool_call(call: tools.ToolCall) -> schemas.ToolCall:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def tool_call_delta(delta: tool_calls.ToolCallDelta) -> schemas.ToolCallDelta:
    """What tells a client of a new call has its id and name; what goes on with one has neither."""
    if delta.id is None or delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function: schemas.FunctionCallDelta = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


def chat_logprobs(logprobs: Sequence[TokenLogprob], token_bytes: TokenBytes) -> schemas.ChatLogprobs:
    return {
        "content": [
            {**_logprob(entry, token_bytes), "top_logprobs": [_logprob(other, token_bytes) for other in entry.top]}
            for entry in logprobs
        ],
        "refusal": None,
    }


def _logprob(entry: TokenLogprob, token_bytes: TokenBytes) -> schemas.Logprob:
    data = list(token_bytes(entry.token_id))
    return {"token": entry.token, "logprob": _number(entry), "bytes": data}


def _number(entry: TokenLogprob) -> float | None:
    return None if entry.logprob is None else max(entry.logprob, LOWEST_LOGPROB)


def text_logprobs(
    logprobs: Sequence[TokenLogprob], offset: int, token_bytes: TokenBytes, echo: Echo | None = None
) -> schemas.TextLogprobs:
    """Those of an answer, which begins after `offset` characters; those of the `echo` of its prompt come first."""
    widths = [characters(token_bytes(entry.token_id)) for entry in logprobs]
    offsets = list(accumulate(widths, initial=offset))[:-1]
    if echo is not None and echo.logprobs is not None:
        logprobs, offsets = [*echo.logprobs, *logprobs], [*echo.offsets, *offsets]
    return {
        "tokens": [entry.token for entry in logprobs],
        "token_logprobs": [_number(entry) for entry in logprobs],
        "top_logprobs": [_alternatives(entry) for entry in logprobs],
        "text_offset": offsets,
    }


def _alternatives(entry: TokenLogprob) -> dict[str, float | None] | None:
    """By text, the likeliest first; of tokens that look alike, that one. The chosen token is among them as well."""
    if entry.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for other in (*entry.top, entry):
        found.setdefault(other.token, _number(other))
    return found


def usage(answers: Sequence[generation.Usage], n: int) -> schemas.Usage:
    """Of all answers; a prompt counts once, however many answers it has."""
    prompts = answers[::n]
    prompt_tokens = sum(each.prompt_tokens for each in prompts)
    completion_tokens = sum(each.completion_tokens for each in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(each.cached_tokens for each in prompts),
            "image_tokens": sum(each.image_tokens for each in prompts),
        },
        "completion_tokens_details": {"reasoning_tokens": sum(each.reasoning_tokens for each in answers)},
    }


def takes_pieces(user_agent: str) -> bool:
    """Whether a client can put a call together that comes in pieces, as OpenAI sends it."""
    return not user_agent.startswith(WHOLE_CALLS)


class Chunks:
    """Turns the text events of an answer into bytes of a stream.

    With `in_pieces` calls come in pieces, as from OpenAI. Else each call comes whole, and the last choice has the
    usage, as from Mistral.
    """

    def __init__(self, envelope: Envelope, token_bytes: TokenBytes, in_pieces: bool = True) -> None:
        request = self.request = envelope.request
        self.token_bytes, self.in_pieces, self.is_chat = token_bytes, in_pieces, request.kind == "chat"
        name = "chat.completion.chunk" if self.is_chat else "text_completion"
        self.head = f'data: {compact({"object": name, **envelope.head})[:-1]},"choices":['
        self.tail = '],"usage":null}\n\n' if request.include_usage else "]}\n\n"
        said, thought = ('"delta":{"content":', '"delta":{"reasoning_content":') if self.is_chat else ('"text":', "")
        self.before_text = [f'{self.head}{{"index":{place},{said}' for place in range(request.answers)]
        self.before_thought = [f'{self.head}{{"index":{place},{thought}' for place in range(request.answers)]
        self.after_text = f'{"}" * self.is_chat},"logprobs":null,"finish_reason":null}}{self.tail}'
        self.replies: list[Reply | None] = [None] * request.answers
        self.held: list[list[TokenLogprob]] = [[] for _ in self.replies]
        self.offsets = [0] * len(self.replies)
        """Characters of the tokens whose log-probabilities were told."""

    def opening(self, first: Sequence[tuple[int, TextEvent]]) -> bytes:
        """A chat's first chunk of each answer, which has the role. The `first` events give the usage of the prompt."""
        if not self.is_chat:
            return b""
        used = first[0][1].usage if self.request.usage_in_each else None
        used = used and replace(used, completion_tokens=0, reasoning_tokens=0)
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        choices = [f'{{"index":{place},{delta}}}' for place in range(len(self.replies))]
        return "".join(self._chunk(choice, used) for choice in choices).encode()

    def of(self, events: list[tuple[int, TextEvent]]) -> bytes:
        """The chunks of what came together; b"" while nothing can be shown."""
        return "".join([self._event(place, event) for place, event in events]).encode()

    def closing(self) -> bytes:
        """After the last event."""
        if not self.request.include_usage:
            return DONE
        return self._with_usage("", self.usage()).encode() + DONE

    def usage(self) -> schemas.Usage:
        """Of all answers, when they have ended."""
        return usage([reply.usage for reply in self.replies if reply is not None], self.request.n)

    def _event(self, place: int, event: TextEvent) -> str:
        if self._is_plain(event):
            thought, text = event.reasoning_content, event.text
            chunk = f"{self.before_thought[place]}{compact(thought)}{self.after_text}" if thought else ""
            return f"{chunk}{self.before_text[place]}{compact(text)}{self.after_text}" if text else chunk
        used = event.usage if self.request.usage_in_each else None
        chunks = "".join([self._chunk(choice, used) for choice in self._choices(place, event)])
        if event.finish_reason:
            self.replies[place] = event.reply
            chunks += self._end(place, event.finish_reason, used)
        return chunks

    def _is_plain(self, event: TextEvent) -> bool:
        """Whether it has a thought or text and nothing else to tell, as nearly all have."""
        return not (
            event.finish_reason or event.logprob or event.tool_call_deltas or event.echo or self.request.usage_in_each
        )

    def _choices(self, place: int, event: TextEvent) -> list[str]:
        """What the event adds to its answer: one choice for each chunk."""
        choices = []
        if event.logprob is not None:
            self.held[place].append(event.logprob)
        if event.echo is not None:
            choices.append(self._echo(place, event.echo))
        if event.reasoning_content:
            choices.append(self._choice(place, f'"delta":{{"reasoning_content":{compact(event.reasoning_content)}}}'))
        if event.text:
            choices.append(self._text(place, event.text))
        deltas = event.tool_call_deltas if self.in_pieces else tool_calls.whole_deltas(event.tool_calls)
        choices += [self._call(place, delta) for delta in deltas]
        if event.finish_reason and self.held[place]:
            choices.append(self._text(place, ""))
        return choices

    def _text(self, place: int, text: str) -> str:
        said = f'"delta":{{"content":{compact(text)}}}' if self.is_chat else f'"text":{compact(text)}'
        return self._choice(place, said)

    def _call(self, place: int, delta: tool_calls.ToolCallDelta) -> str:
        told = tool_call_delta(delta)
        calls = {"function_call": told["function"]} if self.request.older_calls else {"tool_calls": [told]}
        return self._choice(place, f'"delta":{compact(calls)}')

    def _echo(self, place: int, echo: Echo) -> str:
        """The prompt, which comes before the answer."""
        self.offsets[place] = len(echo.text)
        logprobs = None if echo.logprobs is None else text_logprobs((), 0, self.token_bytes, echo)
        said, told = compact(echo.text), compact(logprobs)
        return f'{{"index":{place},"text":{said},"logprobs":{told},"finish_reason":null}}'

    def _choice(self, place: int, content: str) -> str:
        logprobs = self._logprobs(place) if self.held[place] else "null"
        return f'{{"index":{place},{content},"logprobs":{logprobs},"finish_reason":null}}'

    def _end(self, place: int, finish_reason: schemas.FinishReason, used: generation.Usage | None) -> str:
        """The last chunk of an answer. The last of all answers has their usage, for clients that want calls whole."""
        said = '"delta":{}' if self.is_chat else '"text":""'
        reason = older_reason(finish_reason) if self.request.older_calls else finish_reason
        choice = f'{{"index":{place},{said},"logprobs":null,"finish_reason":"{reason}"}}'
        if self.in_pieces or self.request.include_usage or None in self.replies:
            return self._chunk(choice, used)
        return self._with_usage(choice, self.usage())

    def _logprobs(self, place: int) -> str:
        """Of the tokens since the last chunk."""
        held, self.held[place] = self.held[place], []
        if self.is_chat:
            return compact(chat_logprobs(held, self.token_bytes))
        offset = self.offsets[place]
        self.offsets[place] += sum(characters(self.token_bytes(entry.token_id)) for entry in held)
        return compact(text_logprobs(held, offset, self.token_bytes))

    def _chunk(self, choice: str, used: generation.Usage | None) -> str:
        """`used` is told only where each chunk tells the usage so far."""
        return f"{self.head}{choice}{self.tail}" if used is None else self._with_usage(choice, usage([used], 1))

    def _with_usage(self, choice: str, usage: schemas.Usage) -> str:
        return f'{self.head}{choice}],"usage":{compact(usage)}}}\n\n'


class ClientLeft(Exception):
    """Nobody waits for the answer any longer."""


class EventStream(Response):
    """Sends what comes until it ends or the client leaves; then nothing of it is computed any longer.

    `work` runs a function on a thread.
    """

    def __init__(
        self,
        first: Events,
        events: AsyncGenerator[Events],
        chunks: Chunks,
        metrics: Metrics,
        work: Callable[[Callable[[], bytes]], Awaitable[bytes]],
    ) -> None:
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self.first, self.events, self.chunks, self.metrics, self.work = first, events, chunks, metrics, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):
            with suppress(ClientLeft):
                await while_there(receive, self._send(scope, send))

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await _write(send, self.chunks.opening(self.first) + await self._written(self.first))
            async for events in self.events:
                await _write(send, await self._written(events))
        except ApiError as error:
            self.metrics.failed(error.status)
            remember(scope, error)
            await _write(send, error.as_event())
        else:
            used = self.chunks.usage()
            scope["state"]["tokens"] = used["prompt_tokens"], used["completion_tokens"]
            await _write(send, self.chunks.closing())
        await send({"type": "http.response.body", "body": b""})

    async def _written(self, events: Events) -> bytes:
        """An echo has every token of a prompt, and may take seconds: too long for the event loop."""
        if any([event.echo is not None for _, event in events]):  # noqa: C419  a list is quicker
            return await self.work(partial(self.chunks.of, events))
        return self.chunks.of(events)


class NoResponse(Response):
    """For a client that has left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


async def _write(send: Send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def while_there(receive: Receive, work: Awaitable[Result]) -> Result:
    """What `work` gives; it is cancelled when the client leaves. `receive` has no body left to give.

    Raises:
        ClientLeft: nobody waits any longer.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
