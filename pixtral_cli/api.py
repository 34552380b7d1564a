"""A model's name in, an object that answers out: the public API, which the commands use as well."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pixtral_cli import constraints, generation
from pixtral_cli import devices as device_names
from pixtral_cli.encoding_choices import asked_for, kv_encoding
from pixtral_cli.engine.driver import Driver, on_a_thread_that_ends
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.grammar import Vocabulary
from pixtral_cli.engine.transfers import current_device
from pixtral_cli.errors import ModelError, PixtralError
from pixtral_cli.generation import GenerationOptions, Reply, Request, TextEvent, TextStream
from pixtral_cli.generation_options import SPECULATIVE
from pixtral_cli.known_models import DEFAULT_MODEL
from pixtral_cli.model import save, slower_paths
from pixtral_cli.model.free_memory import kind_of
from pixtral_cli.model.kv_cache import PAGE, pages_for
from pixtral_cli.model.load import load
from pixtral_cli.model.memory import Plan, Work, check_weights, kv_tokens, plan
from pixtral_cli.model.pass_sizes import IMAGE_CACHE
from pixtral_cli.model.placement import Placement
from pixtral_cli.prompt.model_settings import ModelSettings
from pixtral_cli.prompt.processor import Processor, Prompt
from pixtral_cli.source import Form, Progress, Source

KEPT_UNASKED = 0.25
"""Of a computer's own memory nobody has given us: so much of the room for keys and values may hold what was."""


class Memory(NamedTuple):
    """Bytes that a loaded model takes, and those that its caches may take; tokens that `kv_cache` bytes hold."""

    weights: int
    kv_cache: int
    kv_tokens: int
    image_cache: int


class Pixtral:
    """A loaded model. Streams and threads may be open at once: their requests share the engine."""

    def __init__(
        self,
        source: Source,
        placement: Placement,
        engine: Engine,
        load_seconds: float,
        work: Work | None = None,
    ) -> None:
        self.source = source
        self.placement = placement
        self.engine = engine
        self.driver = Driver(engine)
        self.load_seconds = load_seconds
        self.work = work or Work()

    @classmethod
    def load(
        cls,
        model_path: str | PathLike[str] | None = DEFAULT_MODEL,
        *,
        weight_paths: Sequence[str | PathLike[str]] = (),
        weights_format: Form | None = None,
        serialized_model_path: str | PathLike[str] | None = None,
        quantization_encoding: str | None = None,
        quantize_vision: bool = False,
        double_quantization: bool = False,
        devices: str | None = None,
        max_length: int | None = None,
        max_batch_size: int = 32,
        max_ce_batch_size: int = 32,
        kv_cache_memory: int | None = None,
        kv_cache_dtype: str = "auto",
        image_cache_memory: int = IMAGE_CACHE,
        speculative: str = "auto",
        image_preprocessing: str | None = None,
        force_download: bool = False,
        progress: Progress | None = None,
    ) -> Pixtral:
        """Load a model by Hub name, folder or file, "tiny" (the built-in one), or from a serialized model.

        The arguments mean what the command line's flags of the same name mean, only that `chat_batch` runs up to
        32 requests at once unless told otherwise. `kv_cache_memory` bounds keys and values, `image_cache_memory` the
        images' features that are kept, both in bytes. `kv_cache_dtype` "fp8" keeps keys and values in half the memory.
        `speculative` "off" computes each token in a step of its own, by which nothing but the time changes.
        `progress(label, done, total)` is told of bytes downloaded and loaded. Raises PixtralError or
        weights_cache.errors.WeightsError, each with a sentence and a `hint`.
        """
        begun = time.perf_counter()
        _positive(max_length=max_length, max_batch_size=max_batch_size, max_ce_batch_size=max_ce_batch_size)
        wanted = asked_for(quantization_encoding, double_quantization)
        kv_encoding(kv_cache_dtype, "")  # what is not known is refused before anything is fetched
        if speculative not in SPECULATIVE:
            raise ModelError(f"speculative should be {' or '.join(map(repr, SPECULATIVE))}, not {speculative!r}.")
        device = torch.device(_device(devices))
        if serialized_model_path is not None:
            source = Source.open_serialized(serialized_model_path, image_preprocessing, progress=progress)
        else:
            source = Source.open(
                model_path,
                weight_paths,
                weights_format=weights_format,
                image_preprocessing=image_preprocessing,
                force_download=force_download,
                progress=progress,
            )
        context = _context(source.config.text.max_length, max_length)
        source.processor.tokenizer.room = context
        _ = source.end_token_ids  # what cannot be read fails now, not at the first question
        placement = source.placement(wanted, quantize_vision)
        work = Work(max_batch_size, context, image_cache_memory, kv_cache_dtype)
        planned = check_weights(source.checkpoint.tensors, placement, source.config, device, work)
        most = pages_for(context) * PAGE * max_batch_size
        room = kv_tokens(planned, device, most, kv_cache_memory)
        unasked = kv_cache_memory is None and device.type == "cpu"

        def make_engine() -> Engine:
            if device.type == "cuda" and placement.dtype == "float32":
                torch.set_float32_matmul_precision("highest")  # NVIDIA's containers have it lower
            with current_device(device):
                model = load(source.checkpoint, source.config, placement, device, progress)
                on_card = device.type == "cuda"  # where what is left can be measured now
                return Engine(
                    model,
                    context,
                    max_batch_size,
                    max_ce_batch_size,
                    kv_tokens=kv_tokens(planned, device, most, kv_cache_memory, loaded=True) if on_card else room,
                    kv_kept=KEPT_UNASKED if unasked else 1.0,
                    image_cache=image_cache_memory,
                    kv_cache_dtype=kv_cache_dtype,
                    speculative=speculative == "auto",
                )

        engine = on_a_thread_that_ends(make_engine)
        return cls(source, placement, engine, time.perf_counter() - begun, work)

    def save(self, path: str | PathLike[str], progress: Progress | None = None) -> None:
        """Write the loaded model as one file that `serialized_model_path` loads, with nothing else needed.

        Raises weights_cache.errors.DiskFull or WriteFailed; an unfinished file is never left behind.
        """
        source, model = self.source, self.engine.model
        source.save(Path(path), self.placement, lambda name: save.loaded(model, name), progress)

    @property
    def encoding(self) -> str:
        """The encoding of most weights."""
        return self.placement.label

    @property
    def notes(self) -> list[str]:
        """Sentences worth telling a user: which form was chosen, which layers fell back to another encoding, what is
        slower on this machine than it could be."""
        slower = slower_paths.notes(self.engine.model.device, set(self.placement.encodings.values()))
        return [note for note in (self.source.checkpoint.note, *self.placement.notes, *slower) if note]

    @property
    def kernels(self) -> str:
        """Which kernels multiply with the weights, in a few words: "avx512bf16 (2 threads)"."""
        return slower_paths.kernels(self.engine.model.device)

    @cached_property
    def plan(self) -> Plan:
        """What the model was expected to take before it was loaded."""
        kind = kind_of(self.engine.model.device)
        return plan(self.source.checkpoint.tensors, self.placement, self.source.config, kind, self.work)

    @property
    def memory(self) -> Memory:
        engine = self.engine
        tokens = engine.table.count * PAGE
        return Memory(self.plan.weights, tokens * self.plan.token, tokens, engine.features.limit)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def processor(self) -> Processor:
        return self.source.processor

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens as grammars need them."""
        return constraints.vocabulary(self.processor.tokenizer, self.source.end_token_ids)

    @property
    def device(self) -> str:
        return str(self.engine.model.device)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.engine.max_length

    def chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> Reply:
        """Answer OpenAI-style messages, perhaps by calls of `tools`; `options` are the fields of GenerationOptions.

        A last message of the assistant's is continued: the reply is what comes after it.

        Raises PromptError (messages, images, template) and RequestError (options, length, memory), both PixtralError.
        """
        return _last(self.stream(messages, tools, **options))

    def complete(self, prompt: str, images: Sequence[Any] = (), **options: Any) -> Reply:
        """Continue a raw text after the images, without a chat template. Raises as `chat`.

        Control words in it, such as ``[INST]``, are control tokens; each ``[IMG]`` is the place of an image.
        """
        return _last(self.stream_complete(prompt, images, **options))

    def chat_batch(self, conversations: Sequence[Sequence[dict[str, Any]]], **options: Any) -> list[Reply]:
        """Answer several conversations, up to `max_batch_size` at once; replies in their order. Raises as `chat`."""
        asked = GenerationOptions.of(options)
        prompts = [self._numbered(place, messages, asked) for place, messages in enumerate(conversations)]
        events = self._run(prompts, asked)
        replies = {place: event.reply for place, event in events if event.reply is not None}
        return [replies[place] for place in range(len(prompts))]

    def stream(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> Generator[TextEvent]:
        """As `chat`, token by token; the last event carries the whole Reply. Closing it frees what it holds.

        Raises at once, as `chat`.
        """
        asked = GenerationOptions.of(options)
        return _only(self._run([self.chat_prompt(messages, tools, asked)], asked))

    def stream_complete(self, prompt: str, images: Sequence[Any] = (), **options: Any) -> Generator[TextEvent]:
        """As `complete`, token by token. Raises at once, as `chat`."""
        return _only(self._run([self.source.complete(prompt, images)], GenerationOptions.of(options)))

    def system_message(self) -> dict[str, Any]:
        """What the repository's SYSTEM_PROMPT.txt tells its model, as a message. Raises ModelError without one."""
        return self.source.system_message()

    def chat_prompt(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, options: GenerationOptions
    ) -> Prompt:
        """The prompt for messages and tools, which may tell the model of the options. Raises PromptError."""
        return self.source.chat(messages, tools, ModelSettings(options.reasoning_effort, options.response_format))

    def jobs(
        self, prompt: Prompt, options: GenerationOptions, answers: int = 1, cache_salt: bytes = b""
    ) -> list[tuple[Request, TextStream]]:
        """For each answer to a prompt: what the engine is asked, and what makes text of its tokens.

        Each makes its own choices: of answers with a seed, the next has the next seed. Raises RequestError.
        """
        name, tokenizer, constraint = self.source.name, self.source.processor.tokenizer, None
        if prompt.tools or options.response_format or options.tool_choice != "auto":
            constraint = constraints.constraint(prompt, options, tokenizer, self.vocabulary)
        request = generation.engine_request(prompt, options, self.source.end_token_ids, tokenizer, constraint)
        self.engine.check(request)
        request = replace(request, cache_salt=cache_salt)
        requests = [request, *(generation.nth(request, place) for place in range(1, answers))]
        return [(each, TextStream(name, prompt, options, tokenizer, self.load_seconds)) for each in requests]

    def _numbered(self, place: int, messages: Sequence[dict[str, Any]], options: GenerationOptions) -> Prompt:
        try:
            return self.chat_prompt(messages, None, options)
        except PixtralError as error:
            error.add_note(f"In conversation {place}, counted from 0.")
            raise

    def _run(self, prompts: list[Prompt], options: GenerationOptions) -> Generator[tuple[int, TextEvent]]:
        jobs = [job for prompt in prompts for job in self.jobs(prompt, options)]
        return generation.run(self.driver, jobs)


def _only(events: Generator[tuple[int, TextEvent]]) -> Generator[TextEvent]:
    with closing(events):
        for _, event in events:
            yield event


def _positive(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ModelError(f"{name} should be a whole number above 0, not {value!r}.")


def _device(text: str | None) -> str:
    gpus = torch.cuda.device_count()
    if text is None:
        return device_names.default(gpus)
    return device_names.parse(text).torch_name(gpus, slower_paths.sees_gpus())


def _context(model: int, wanted: int | None) -> int:
    if wanted is not None and wanted > model:
        raise ModelError(
            f"The model's context is {model} tokens, and --max-length asks for {wanted}.",
            hint=f"Give at most {model}, or leave --max-length out.",
        )
    return wanted or model


def _last(events: Iterator[TextEvent]) -> Reply:
    reply = None
    for event in events:
        reply = event.reply
    assert reply is not None, "the engine ended a request without its last event"
    return reply
