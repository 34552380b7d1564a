"""Asks in, text events out, for as long as a client listens: the queue and its bounds. Knows no HTTP framing.

What blocks (templates, tokenising, pictures, grammars) runs on a few threads, never on the event loop; the engine runs
on its own, and its tokens come back in one hand-over however many answers they belong to.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from pixtral_cli.api import Pixtral
from pixtral_cli.errors import RequestError
from pixtral_cli.generate import Answering, Failure, GenerationOptions, Request, TextEvent
from pixtral_cli.prompt.processor import Prompt
from pixtral_cli.prompt.tokenizer import ByteStream
from pixtral_cli.server.errors import ApiError
from pixtral_cli.server.problems import refusal_of
from pixtral_cli.server.wire import Ask, TextOrTokens

QUICK_THREADS = 4
SLOW_THREADS = 16
"""For what may wait for the network, or take a decoder's or a grammar's time."""
RETRY_SECONDS = 5
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p")
Result = TypeVar("Result")
Events = list[tuple[int, TextEvent]]
"""What came together: the answer's place, and what its next token adds."""
logger = logging.getLogger(__name__)


class Worker(Protocol):
    """`pixtral_cli.engine.worker.Worker`."""

    @property
    def alive(self) -> bool: ...
    def submit(self, request: Request, sink: Callable[[Any], None]) -> int: ...
    def cancel(self, request_id: int) -> None: ...


class Metrics(Protocol):
    """What a service tells of itself, in seconds."""

    def error(self, kind: str) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def exposition(self) -> bytes: ...


class NoMetrics:
    """Counts nothing."""

    def error(self, kind: str) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def next_token(self, seconds: float) -> None: ...
    def exposition(self) -> bytes:
        return b""


@dataclass(frozen=True)
class Limits:
    """What is too much, each named by its flag."""

    max_images: int = 32
    max_queue: int = 512


@dataclass
class Service:
    """One model and those who ask it.

    Args:
        worker: of the model's engine.
        names: what requests may call the model; the first is what it calls itself.
        defaults: options that the server's flags give; what a request says comes before, the checkpoint's own
            generation_config.json after them.
    """

    model: Pixtral
    worker: Worker
    names: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=NoMetrics)
    draining: bool = False

    def __post_init__(self) -> None:
        self.accepted = 0
        self.started_at = int(time.time())
        self.options = {**checkpoint_defaults(self.model.source.checkpoint.generation_config), **self.defaults}
        self.quick = ThreadPoolExecutor(QUICK_THREADS, "prompts")
        self.slow = ThreadPoolExecutor(SLOW_THREADS, "pictures")
        self._handover: Handover | None = None
        self._open: set[_Answers] = set()

    @property
    def ready(self) -> bool:
        """Whether a request would be worked on."""
        return self.worker.alive and not self.draining

    def drain(self) -> None:
        """Take nothing new, and send away who waits; whose first token is there may finish."""
        self.draining = True
        for answers in self._open:
            answers.send_away()

    @property
    def idle(self) -> bool:
        """Whether nobody is being answered."""
        return not self._open

    def check_name(self, name: str | None) -> None:
        """Raise ApiError unless `name` is the model's; None is."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404,
                f"The model {name[:200]!r} is not served here; {known} is.",
                param="model",
                code="model_not_found",
            )

    async def answer(self, ask: Ask, salt: bytes = b"") -> AsyncGenerator[Events]:
        """The events of all answers, as they come; closing it frees what they hold within one step.

        Raises:
            ApiError: what was asked cannot be answered, the queue is full, the server ends, the engine failed.
        """
        answers = _Answers(self, ask, salt)
        self._admit(ask.answers)
        self._open.add(answers)
        try:
            await answers.submit()
            while answers.running:
                yield await answers.next()
        finally:
            answers.cancel()
            self._open.discard(answers)
            self.accepted -= ask.answers

    async def prompt(self, text: str | None, messages: list[dict[str, Any]] | None, tools: Any) -> Prompt:
        """The prompt of a text or of a chat, whose pictures are looked at. Raises ApiError."""
        if messages is None:
            return await self.work(partial(self._text, text))
        return await self.work(partial(self._chat, messages, tools), slow=True)

    async def text_of(self, token_ids: list[int]) -> str:
        """The text that the tokens are, without control tokens. Raises ApiError."""
        return await self.work(partial(self._decoded, token_ids))

    async def work(self, build: Callable[[], Result], *, slow: bool = False) -> Result:
        """`build()` on a thread; who is cancelled meanwhile does not wait for it. Raises ApiError."""
        try:
            return await asyncio.wrap_future((self.slow if slow else self.quick).submit(build))
        except Exception as error:
            raise self.refusal(error) from error

    def refusal(self, error: Exception) -> ApiError:
        """How a failure is told to who asked."""
        refusal = refusal_of(error)
        if refusal.status >= 500 and refusal is not error:
            logger.error("a request failed", exc_info=error)
        return refusal

    def _admit(self, wanted: int) -> None:
        """Count `wanted` answers, from now until they end. Raises ApiError."""
        if self.draining:
            raise _leaving()
        room = self.model.engine.scheduler.max_batch_size + self.limits.max_queue
        if self.accepted >= room:
            raise ApiError(
                429,
                f"The queue is full: --max-queue {self.limits.max_queue} requests wait already.",
                "rate_limit_error",
                code="queue_full",
                headers=[("Retry-After", str(RETRY_SECONDS))],
            )
        self.accepted += wanted

    def jobs(self, ask: Ask, salt: bytes) -> list[tuple[Request, Answering]]:
        """The engine's requests, `ask.n` for each prompt; blocks. Raises PixtralError."""
        options = GenerationOptions.of({**self.options, **ask.options})
        if ask.kind == "chat":
            prompts = [self._chat(ask.messages, ask.tools)]
        else:
            prompts = [self._text(prompt) for prompt in ask.prompts]
        return [job for prompt in prompts for job in self.model.jobs(prompt, options, ask.n, salt)]

    def _chat(self, messages: list[dict[str, Any]], tools: Any) -> Prompt:
        pictures = sum(_is_picture(part) for message in messages for part in _parts(message))
        if pictures > self.limits.max_images:
            raise RequestError(
                f"The messages hold {pictures} pictures, more than --max-images {self.limits.max_images}."
            )
        return self.model.source.chat(messages, tools)

    def _text(self, prompt: TextOrTokens) -> Prompt:
        if isinstance(prompt, str):
            return self.model.source.complete(prompt)
        tokens = self.model.processor.image_tokens
        if tokens is not None and tokens.patch in prompt:
            raise RequestError(f"The prompt has token {tokens.patch}, which stands for a picture, and no picture.")
        return Prompt(prompt, [], answer_starts_text=False)

    def _decoded(self, token_ids: list[int]) -> str:
        size = self.model.vocabulary.size
        if outside := [token_id for token_id in token_ids if token_id >= size]:
            raise RequestError(f"tokens has {outside[0]}, and the model knows {size}.")
        stream = ByteStream(self.model.processor.tokenizer)
        return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()

    def handover(self) -> Handover:
        """The way from the engine's thread to this event loop."""
        if self._handover is None:
            self._handover = Handover(asyncio.get_running_loop())
        return self._handover

    def close(self) -> None:
        """Let go of the threads; what they do is not waited for."""
        for pool in (self.quick, self.slow):
            pool.shutdown(wait=False, cancel_futures=True)


class Arrival(NamedTuple):
    """An event of the engine for the answer `place`, and when it came (of `time.perf_counter`)."""

    box: _Answers
    place: int
    event: Any
    at: float


class Handover:
    """Events from the engine's thread to the event loop: one call into the loop for all that a step gives."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.arrived: deque[Arrival] = deque()
        self.awake = False

    def put(self, box: _Answers, place: int, event: Any) -> None:
        """A sink, on the engine's thread."""
        self.arrived.append(Arrival(box, place, event, time.perf_counter()))
        if not self.awake:
            self.awake = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self.awake = False
        while self.arrived:
            arrival = self.arrived.popleft()
            arrival.box.receive(arrival)


class _Answers:
    """One ask's answers on their way."""

    def __init__(self, service: Service, ask: Ask, salt: bytes) -> None:
        self.service, self.ask, self.salt = service, ask, salt
        self.begun = time.perf_counter()
        self.running: dict[int, int] = {}  # place of the answer -> the engine's id
        self.answerings: list[Answering] = []
        self.latest: dict[int, float] = {}  # when each answer's last token came
        self.arrived: list[Arrival] = []
        self.wake = asyncio.Event()
        self.task: asyncio.Task[Any] | None = None
        self.sent_away = False

    async def submit(self) -> None:
        """Make the prompts and queue them. Raises ApiError."""
        service, ask = self.service, self.ask
        slow = bool(ask.tools or "response_format" in ask.options or _has_pictures(ask))
        jobs = await service.work(partial(service.jobs, ask, self.salt), slow=slow)
        if self.sent_away:
            raise _leaving()
        handover = service.handover()
        self.answerings = [answering for _, answering in jobs]
        for place, (request, _) in enumerate(jobs):
            self.running[place] = service.worker.submit(request, partial(handover.put, self, place))

    def receive(self, arrival: Arrival) -> None:
        self.arrived.append(arrival)
        self.wake.set()

    def send_away(self) -> None:
        """Unless the first token is there."""
        if not self.latest and not self.arrived:
            self.sent_away = True
            self.wake.set()

    async def next(self) -> Events:
        """What has come since, at least one event. Raises ApiError."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            if self.sent_away:
                raise _leaving()
            arrived, self.arrived = self.arrived, []
            events = [(arrival.place, self._told(arrival)) for arrival in arrived if arrival.place in self.running]
            if events:
                return events

    def _told(self, arrival: Arrival) -> TextEvent:
        if isinstance(arrival.event, Failure):
            raise self.service.refusal(arrival.event.error)
        place = arrival.place
        self._measure(place, arrival.at)
        told = self.answerings[place].push(arrival.event)
        if told.finish_reason:
            self.service.worker.cancel(self.running.pop(place))  # a stop string ends it before the engine would
        return told

    def _measure(self, place: int, now: float) -> None:
        before = self.latest.get(place)
        if before is None:
            self.service.metrics.first_token(now - self.begun)
        else:
            self.service.metrics.next_token(now - before)
        self.latest[place] = now

    def cancel(self) -> None:
        for request_id in self.running.values():
            self.service.worker.cancel(request_id)
        self.running.clear()


def checkpoint_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a generation_config.json sets: as in transformers, it samples only where it says `do_sample`."""
    keys = ("repetition_penalty", *(SAMPLING_KEYS if config.get("do_sample") is True else ()))
    return {key: config[key] for key in keys if config.get(key) is not None}


def _leaving() -> ApiError:
    return ApiError(
        503,
        "The server is about to end.",
        "server_error",
        code="draining",
        headers=[("Retry-After", str(RETRY_SECONDS))],
    )


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image_url"


def _has_pictures(ask: Ask) -> bool:
    return any(_is_picture(part) for message in ask.messages for part in _parts(message))
