"""Requests in, text events out, for as long as a client listens: one model, its names, its queue. Knows no HTTP.

What blocks (templates, tokenising, pictures, grammars) runs on a few threads, never on the event loop; the engine runs
on a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

from pixtral_cli.api import Pixtral
from pixtral_cli.engine.driver import Driver
from pixtral_cli.errors import RequestError
from pixtral_cli.generation import Event, Failure, GenerationOptions, Reply, Request, TextEvent, TextStream
from pixtral_cli.prompt.processor import Prompt
from pixtral_cli.prompt.tokenizer import ByteStream
from pixtral_cli.server.errors import ApiError, queue_full, refusal_of, stopping, unknown_model
from pixtral_cli.server.metrics import Metrics
from pixtral_cli.server.threads import Threads
from pixtral_cli.server.wire import AnswerRequest, TextOrTokens, count_images

QUICK_THREADS = 4
SLOW_THREADS = 64
"""For what waits for the network or a turn at the decoder, and for grammars."""
MAX_LOGPROBS = 3_000_000
"""Log-probabilities of prompts in one answer: as many as 131,072 tokens have with 20 alternatives."""
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p")
Result = TypeVar("Result")
Events = list[tuple[int, TextEvent]]
"""What came together: the answer's place, and what its next token adds."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What is too much, each named by its flag."""

    max_images: int = 32
    max_queue: int = 512


@dataclass
class Service:
    """One model and the requests that it answers.

    Args:
        names: what requests may call the model; the first is what it calls itself.
        defaults: options that the server's flags give. What a request says comes before them, and the checkpoint's
            own generation_config.json after them.
    """

    model: Pixtral
    names: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    draining: bool = False

    def __post_init__(self) -> None:
        self.accepted = 0
        """Answers asked for and not ended, from before their prompts are made."""
        self.driver = self.model.driver
        self.metrics = Metrics(self.driver)
        self.started_at = int(time.time())
        self.options = {**checkpoint_defaults(self.model.source.checkpoint.generation_config), **self.defaults}
        self.quick, self.slow = Threads(QUICK_THREADS, "prompts"), Threads(SLOW_THREADS, "pictures")
        self.bridge = EventLoopBridge(self.driver)
        self._open: set[Subscription] = set()

    @property
    def preparing(self) -> bool:
        """Whether a thread still works on a prompt."""
        return bool(self.quick.busy or self.slow.busy)

    @property
    def idle(self) -> bool:
        """Whether nothing is asked for or being prepared."""
        return not (self._open or self.preparing)

    def drain(self) -> None:
        """Refuse what comes and what waits; what the engine has begun may finish."""
        self.draining = True
        begun = {sequence.id for sequence in self.model.engine.scheduler.running}
        for subscription in self._open:
            subscription.refuse_unless(begun)

    def check_name(self, name: str | None) -> None:
        """Raise ApiError unless `name` is the model's; None is."""
        if name is not None and name not in self.names:
            raise unknown_model(name, self.names)

    async def answer(self, request: AnswerRequest, salt: bytes = b"") -> AsyncGenerator[Events]:
        """The events of all answers, as they come; closing it frees what they hold within one step.

        Raises:
            ApiError: what was asked cannot be answered, the queue is full, the server ends, the engine failed.
        """
        self._check_room()
        subscription = Subscription(self.bridge, self.metrics)
        self.accepted += request.answers
        self._open.add(subscription)
        try:
            jobs = self.work(partial(self._jobs, request, salt), param=request.param, slow=request.is_slow)
            subscription.submit(await subscription.unless_refused(jobs))
            request.messages.clear()  # they are in the prompt now, and pictures in them may be large
            while subscription.running:
                yield await subscription.next()
        except Exception as error:
            raise self._refusal(error, request.param) from error
        finally:
            subscription.cancel()
            self._open.discard(subscription)
            self.accepted -= request.answers

    async def replies(self, request: AnswerRequest, salt: bytes = b"") -> list[Reply]:
        """All answers in order, when they have ended. Raises ApiError as `answer`."""
        async with aclosing(self.answer(request, salt)) as events:
            found = {place: event.reply async for batch in events for place, event in batch if event.reply is not None}
        return [found[place] for place in range(request.answers)]

    async def prompt(self, text: str | None, messages: list[dict[str, Any]] | None, tools: Any) -> Prompt:
        """The prompt of a text or of a chat, whose pictures are looked at. Raises ApiError."""
        if messages is None:
            return await self.work(partial(self._text, text or ""))
        chat = partial(self._chat, messages, tools)
        return await self.work(chat, param="messages", slow=bool(count_images(messages)))

    async def text_of(self, token_ids: list[int]) -> str:
        """The text that the tokens are, without control tokens. Raises ApiError."""
        return await self.work(partial(self._decoded, token_ids))

    async def work(self, build: Callable[[], Result], *, param: str = "prompt", slow: bool = False) -> Result:
        """What `build()` gives, on a thread; a caller that is cancelled does not wait for it.

        Raises ApiError, about the field `param` where that is too long.
        """
        try:
            return await (self.slow if slow else self.quick).run(build)
        except Exception as error:
            raise self._refusal(error, param) from error

    def _refusal(self, error: Exception, param: str) -> ApiError:
        """What a client is told of a failure; one of the server's own is logged."""
        refusal = refusal_of(error, param)
        if refusal is not error and refusal.status >= 500:
            logger.error("A request failed: %s: %.300s", type(error).__name__, error)
            logger.debug("It came from here.", exc_info=error)
        return refusal

    def _check_room(self) -> None:
        if self.draining:
            raise stopping()
        if self.accepted >= self.model.engine.scheduler.max_batch_size + self.limits.max_queue:
            raise queue_full(self.limits.max_queue)

    def _jobs(self, request: AnswerRequest, salt: bytes) -> list[tuple[Request, TextStream]]:
        """What the engine is asked, `request.n` times for each prompt; blocks. Raises PixtralError."""
        options = GenerationOptions.of({**self.options, **request.options})
        if request.kind == "chat":
            self._check_pictures(request.messages)
            prompts = [self.model.chat_prompt(request.messages, request.tools, options)]
        else:
            prompts = [self._text(prompt) for prompt in request.prompts]
            _check_logprobs(prompts, options, request.n)
        return [job for prompt in prompts for job in self.model.jobs(prompt, options, request.n, salt)]

    def _chat(self, messages: list[dict[str, Any]], tools: Any) -> Prompt:
        self._check_pictures(messages)
        return self.model.chat_prompt(messages, tools, GenerationOptions.of(self.options))

    def _check_pictures(self, messages: list[dict[str, Any]]) -> None:
        pictures, most = count_images(messages), self.limits.max_images
        if pictures > most:
            raise RequestError(f"The messages hold {pictures} pictures, and --max-images is {most}.")

    def _text(self, prompt: TextOrTokens) -> Prompt:
        if isinstance(prompt, str):
            return self.model.source.complete(prompt)
        self._check_known(prompt)
        tokens = self.model.processor.image_tokens
        if tokens is not None and tokens.patch in prompt:
            raise RequestError(f"The prompt has token {tokens.patch}, which stands for a picture, and no picture.")
        return Prompt(prompt, [], answer_starts_text=False)

    def _decoded(self, token_ids: list[int]) -> str:
        self._check_known(token_ids)
        stream = ByteStream(self.model.processor.tokenizer)
        return "".join([stream.push(token_id) for token_id in token_ids]) + stream.finish()

    def _check_known(self, token_ids: list[int]) -> None:
        size = self.model.vocabulary.size
        if outside := [token_id for token_id in token_ids if token_id >= size]:
            raise RequestError(f"There is no token {outside[0]}: the model knows {size}.")


def _check_logprobs(prompts: Sequence[Prompt], options: GenerationOptions, n: int) -> None:
    """Raise RequestError if more log-probabilities of prompts are asked for than memory should hold."""
    if not options.echo or options.alternatives is None:
        return
    count = n * sum(len(prompt.token_ids) for prompt in prompts) * (1 + options.alternatives)
    if count > MAX_LOGPROBS:
        raise RequestError(
            f"The prompts have {count} log-probabilities to tell, and one answer tells at most {MAX_LOGPROBS}.",
            hint="Send fewer prompts together, or ask for less in logprobs.",
        )


def checkpoint_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a generation_config.json sets: as in transformers, it samples only where it says `do_sample`."""
    keys = ("repetition_penalty", *(SAMPLING_KEYS if config.get("do_sample") is True else ()))
    return {key: config[key] for key in keys if config.get(key) is not None}


class Arrival(NamedTuple):
    """An event of the engine, and when it came (of `time.perf_counter`)."""

    event: Event
    at: float


class EventLoopBridge:
    """Events from the engine's thread to the event loop: one call into the loop for all that a step gives.

    All but `_put` is for the event loop, which is the one that submits.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._loop: asyncio.AbstractEventLoop | None = None
        self._subscriptions: dict[int, Subscription] = {}
        """By the engine's ids."""
        self._arrived: deque[tuple[list[Event], float]] = deque()
        self._called = False

    def submit(self, request: Request, subscription: Subscription) -> int:
        """Queue a request -> the engine's id; from now on the subscription receives its events."""
        self._loop = asyncio.get_running_loop()
        request_id = self.driver.submit(request, self._put)
        self._subscriptions[request_id] = subscription  # in time: nothing is delivered while this runs
        return request_id

    def cancel(self, request_id: int) -> None:
        """Nothing more is received of it; what still runs ends with the engine's step."""
        self._subscriptions.pop(request_id, None)
        self.driver.cancel(request_id)

    def _put(self, events: list[Event]) -> None:
        """A sink, on the engine's thread."""
        self._arrived.append((events, time.perf_counter()))
        if not self._called:
            self._called = True
            assert self._loop is not None, "events without a request"
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before the deque is emptied: a `_put` after this calls again
        while self._arrived:
            events, at = self._arrived.popleft()
            for event in events:
                if (subscription := self._subscriptions.get(event.request_id)) is not None:
                    subscription.receive(Arrival(event, at))


class Subscription:
    """One request's answers on their way."""

    def __init__(self, bridge: EventLoopBridge, metrics: Metrics) -> None:
        self.bridge, self.metrics = bridge, metrics
        self.running: dict[int, int] = {}
        """The engine's ids of the answers that have not ended, and their places."""
        self._streams: list[TextStream] = []
        self._begun = time.perf_counter()
        self._latest: dict[int, float] = {}  # when the last token of each place came
        self._arrived: list[Arrival] = []
        self._waiter: asyncio.Future[None] | None = None  # of `next`
        self._is_refused = False
        self._preparing: asyncio.Future[Any] | None = None

    async def unless_refused(self, preparing: Awaitable[Result]) -> Result:
        """What `preparing` gives, without which nothing can be queued. Raises ApiError if the server ends before."""
        self._preparing = asyncio.ensure_future(preparing)
        try:
            return await self._preparing
        except asyncio.CancelledError:
            if self._is_refused:
                raise stopping() from None
            raise

    def submit(self, jobs: Sequence[tuple[Request, TextStream]]) -> None:
        """Queue them all; their pictures are not kept here."""
        self._preparing = None
        self._streams = [stream for _, stream in jobs]
        for place, (request, _) in enumerate(jobs):
            self.running[self.bridge.submit(request, self)] = place

    def refuse_unless(self, begun: set[int]) -> None:
        """Let them fail, unless the engine has begun one of them."""
        if not self._latest and not self._arrived and begun.isdisjoint(self.running):
            self._is_refused = True
            self._wake()
            if self._preparing is not None:
                self._preparing.cancel()

    def receive(self, arrival: Arrival) -> None:
        self._arrived.append(arrival)
        self._wake()

    async def next(self) -> Events:
        """What has come since, at least one event. Raises ApiError, and what the engine failed with."""
        while True:
            while not (self._arrived or self._is_refused):
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            if self._is_refused:
                raise stopping()
            arrived, self._arrived = self._arrived, []
            events = [self._text_event(event, at) for event, at in arrived if event.request_id in self.running]
            if events:
                return events

    def cancel(self) -> None:
        """What still runs ends with the engine's step."""
        for request_id in self.running:
            self.bridge.cancel(request_id)
        self.running.clear()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _text_event(self, event: Event, at: float) -> tuple[int, TextEvent]:
        if isinstance(event, Failure):
            raise event.error
        place = self.running[event.request_id]
        self._measure(place, at)
        text_event = self._streams[place].push(event)
        if text_event.finish_reason:
            del self.running[event.request_id]
            self.bridge.cancel(event.request_id)  # a stop string ends it before the engine would
        return place, text_event

    def _measure(self, place: int, now: float) -> None:
        before = self._latest.get(place)
        if before is None:
            self.metrics.first_token.observe(now - self._begun)
        else:
            self.metrics.per_token.observe(now - before)
        self._latest[place] = now
