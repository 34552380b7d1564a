"""Asks in, text events out, for as long as a client listens: one model, its names, its queue. Knows no HTTP framing.

What blocks (templates, tokenising, pictures, grammars) runs on a few threads, never on the event loop; the engine runs
on a thread of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from pixtral_cli.api import Pixtral
from pixtral_cli.engine.driver import Driver
from pixtral_cli.errors import RequestError
from pixtral_cli.generation import GenerationOptions, Request, TextStream
from pixtral_cli.prompt.processor import Prompt
from pixtral_cli.prompt.tokenizer import ByteStream
from pixtral_cli.server.answers import Answers, Events, Handover
from pixtral_cli.server.errors import ApiError
from pixtral_cli.server.metrics import Metrics
from pixtral_cli.server.problems import leaving, queue_full, refusal_of, unknown_model
from pixtral_cli.server.threads import Threads
from pixtral_cli.server.wire import Ask, TextOrTokens, count_pictures

QUICK_THREADS = 4
SLOW_THREADS = 64
"""For what waits for the network or a turn at the decoder, and for grammars."""
MOST_TOLD = 3_000_000
"""Log-probabilities of prompts in one answer: as many as 131,072 tokens have with 20 alternatives."""
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p")
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What is too much, each named by its flag."""

    max_images: int = 32
    max_queue: int = 512


@dataclass
class Service:
    """One model and those who ask it.

    Args:
        driver: of the model's engine.
        names: what requests may call the model; the first is what it calls itself.
        defaults: options that the server's flags give. What a request says comes before them, and the checkpoint's
            own generation_config.json after them.
    """

    model: Pixtral
    driver: Driver
    names: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    draining: bool = False

    def __post_init__(self) -> None:
        self.accepted = 0
        """Answers asked for and not ended, from before their prompts are made."""
        self.metrics = Metrics(self.model.engine)
        self.started_at = int(time.time())
        self.options = {**checkpoint_defaults(self.model.source.checkpoint.generation_config), **self.defaults}
        self.quick, self.slow = Threads(QUICK_THREADS, "prompts"), Threads(SLOW_THREADS, "pictures")
        self.handover = Handover()
        self._open: set[Answers] = set()

    @property
    def ready(self) -> bool:
        """Whether a request would be worked on."""
        return self.driver.alive and not self.draining

    @property
    def preparing(self) -> bool:
        """Whether a thread still works on a prompt."""
        return bool(self.quick.busy or self.slow.busy)

    @property
    def idle(self) -> bool:
        """Whether nothing is asked for or being prepared."""
        return not (self._open or self.preparing)

    def drain(self) -> None:
        """Take nothing new, and send away who waits; what the engine has begun may finish."""
        self.draining = True
        begun = {sequence.id for sequence in self.model.engine.scheduler.running}
        for answers in self._open:
            answers.send_away_unless(begun)

    def check_name(self, name: str | None) -> None:
        """Raise ApiError unless `name` is the model's; None is."""
        if name is not None and name not in self.names:
            raise unknown_model(name, self.names)

    async def answer(self, ask: Ask, salt: bytes = b"") -> AsyncGenerator[Events]:
        """The events of all answers, as they come; closing it frees what they hold within one step.

        Raises:
            ApiError: what was asked cannot be answered, the queue is full, the server ends, the engine failed.
        """
        self._check_room()
        answers = Answers(self.driver, self.metrics)
        self.accepted += ask.answers
        self._open.add(answers)
        try:
            making = self.work(partial(self._jobs, ask, salt), asked=ask.asked, slow=ask.is_slow)
            answers.submit(await answers.unless_sent_away(making), self.handover)
            ask.messages.clear()  # they are in the prompt now, and pictures in them may be large
            while answers.running:
                yield await answers.next()
        except Exception as error:
            raise self._refusal(error, ask.asked) from error
        finally:
            answers.cancel()
            self._open.discard(answers)
            self.accepted -= ask.answers

    async def prompt(self, text: str | None, messages: list[dict[str, Any]] | None, tools: Any) -> Prompt:
        """The prompt of a text or of a chat, whose pictures are looked at. Raises ApiError."""
        if messages is None:
            return await self.work(partial(self._text, text or ""))
        chat = partial(self._chat, messages, tools)
        return await self.work(chat, asked="messages", slow=bool(count_pictures(messages)))

    async def text_of(self, token_ids: list[int]) -> str:
        """The text that the tokens are, without control tokens. Raises ApiError."""
        return await self.work(partial(self._decoded, token_ids))

    async def work(self, build: Callable[[], Result], *, asked: str = "prompt", slow: bool = False) -> Result:
        """`build()` on a thread; who is cancelled meanwhile does not wait for it.

        Raises ApiError, about the field `asked` where that is too long.
        """
        try:
            return await (self.slow if slow else self.quick).run(build)
        except Exception as error:
            raise self._refusal(error, asked) from error

    def _refusal(self, error: Exception, asked: str) -> ApiError:
        """How a failure is told to who asked; what is not theirs is logged."""
        refusal = refusal_of(error, asked)
        if refusal is not error and refusal.status >= 500:
            logger.error("A request failed: %s: %.300s", type(error).__name__, error)
            logger.debug("It came from here.", exc_info=error)
        return refusal

    def _check_room(self) -> None:
        if self.draining:
            raise leaving()
        if self.accepted >= self.model.engine.scheduler.max_batch_size + self.limits.max_queue:
            raise queue_full(self.limits.max_queue)

    def _jobs(self, ask: Ask, salt: bytes) -> list[tuple[Request, TextStream]]:
        """What the engine is asked, `ask.n` times for each prompt; blocks. Raises PixtralError."""
        options = GenerationOptions.of({**self.options, **ask.options})
        if ask.kind == "chat":
            prompts = [self._chat(ask.messages, ask.tools)]
        else:
            prompts = [self._text(prompt) for prompt in ask.prompts]
            _check_told(prompts, options, ask.n)
        return [job for prompt in prompts for job in self.model.jobs(prompt, options, ask.n, salt)]

    def _chat(self, messages: list[dict[str, Any]], tools: Any) -> Prompt:
        pictures, most = count_pictures(messages), self.limits.max_images
        if pictures > most:
            raise RequestError(f"The messages hold {pictures} pictures, and --max-images is {most}.")
        return self.model.source.chat(messages, tools)

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


def _check_told(prompts: Sequence[Prompt], options: GenerationOptions, n: int) -> None:
    """Raise RequestError if more log-probabilities of prompts are asked for than memory should hold."""
    if not options.echo or options.alternatives is None:
        return
    told = n * sum(len(prompt.token_ids) for prompt in prompts) * (1 + options.alternatives)
    if told > MOST_TOLD:
        raise RequestError(
            f"The prompts have {told} log-probabilities to tell, and one answer tells at most {MOST_TOLD}.",
            hint="Send fewer prompts together, or ask for less in logprobs.",
        )


def checkpoint_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a generation_config.json sets: as in transformers, it samples only where it says `do_sample`."""
    keys = ("repetition_penalty", *(SAMPLING_KEYS if config.get("do_sample") is True else ()))
    return {key: config[key] for key in keys if config.get(key) is not None}
