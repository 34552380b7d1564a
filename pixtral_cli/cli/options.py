"""The flags that commands share, as Typer parameters in small frozen dataclasses. Knows no model and no terminal.

Their types stay real objects (no `from __future__ import annotations` here), because Typer reads them.
"""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from pixtral_cli.cli import completions
from pixtral_cli.cli.console import Console
from pixtral_cli.cli.flags import (
    UsageError,
    device_text,
    one_of,
    stop_texts,
    token_limit,
    whole_text,
    within,
    within_option,
)
from pixtral_cli.encoding_choices import CHOICES, KV_CACHE_DTYPES
from pixtral_cli.generation_options import SPECULATIVE
from pixtral_cli.known_models import DEFAULT_MODEL

if TYPE_CHECKING:
    from weights_cache.layout import Form

RECIPES = ("hf", "native")
FORMATS = ("hf", "native", "gguf")

_request, _model, _answer, _output, _machine = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Request", "Model", "Answer", "Output", "Speed and memory")
)

KV_CACHE_DTYPE = _machine(
    "--kv-cache-dtype",
    metavar="auto|fp8",
    help="How keys and values are kept: auto as the model computes, fp8 in half the memory.",
    **one_of(KV_CACHE_DTYPES),
)


@dataclass(frozen=True, kw_only=True)
class FetchFlags:
    """What of a model is fetched."""

    weights_format: Annotated[
        str | None,
        _model(
            "--weights-format",
            metavar="hf|native|gguf",
            help="Which format to read if the model has several.",
            **one_of(FORMATS),
        ),
    ] = None
    force_download: Annotated[bool, _model("--force-download", help="Download again, even if the model is cached.")] = (
        False
    )

    @property
    def form(self) -> "Form | None":
        """The form asked for, None where any will do."""
        return cast("Form | None", self.weights_format)  # which one_of has checked


@dataclass(frozen=True, kw_only=True)
class SourceFlags(FetchFlags):
    """Which model, and how its pictures are prepared."""

    model_path: Annotated[
        str | None,
        _model(
            "--model-path",
            metavar="NAME",
            envvar="PIXTRAL_MODEL_PATH",
            autocompletion=completions.MODEL.offered,
            help="A Hugging Face name, a local folder, a .gguf file, or tiny, the built-in demonstration model. "
            f"Default: {DEFAULT_MODEL}.",
        ),
    ] = None
    image_preprocessing: Annotated[
        str | None,
        _model(
            "--image-preprocessing",
            metavar="hf|native",
            help="How pictures become pixels: as in transformers (hf) or as in mistral-common (native). "
            "Default: the way that fits the checkpoint.",
            **one_of(RECIPES),
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        _model(
            "--trust-remote-code",
            help="Accepted for compatibility, without effect: code from a repository is never run.",
        ),
    ] = False

    @property
    def name(self) -> str:
        """The model's name, the default if none was given."""
        return DEFAULT_MODEL if self.model_path is None else self.model_path


@dataclass(frozen=True, kw_only=True)
class EncodingFlags:
    """Which weights, and how they are kept."""

    weight_path: Annotated[
        list[Path] | None,
        _model(
            "--weight-path",
            metavar="PATH",
            autocompletion=completions.WEIGHTS.offered,
            help="Read the weights from this file or folder instead. Repeatable.",
        ),
    ] = None
    quantization_encoding: Annotated[
        str | None,
        _model(
            "--quantization-encoding",
            metavar="NAME",
            help=f"How the weights are stored: {', '.join(CHOICES)}. Default: as in the checkpoint.",
            **one_of(CHOICES),
        ),
    ] = None
    quantize_vision: Annotated[
        bool, _model("--quantize-vision", help="Pack the picture part too; otherwise it stays bfloat16.")
    ] = False
    double_quantization: Annotated[
        bool,
        _model(
            "--double-quantization",
            help="nf4 only: pack its scales too, for 8 % less memory. Not for weights that are already nf4.",
        ),
    ] = False

    def check(self) -> None:
        """Raises UsageError for flags that cannot be meant together."""
        if self.double_quantization and self.quantization_encoding != "nf4":
            raise UsageError(
                "--double-quantization is a form of nf4, and that is not asked for.",
                "Add --quantization-encoding nf4, or leave --double-quantization out.",
            )


@dataclass(frozen=True, kw_only=True)
class WeightFlags(EncodingFlags):
    """Which weights, how they are kept, where they run, and the one file that they can be kept in."""

    devices: Annotated[
        str | None,
        _machine(
            "--devices",
            metavar="NAMES",
            callback=device_text,
            autocompletion=completions.DEVICES.offered,
            help="cpu, gpu or gpu-N. Default: the first GPU, else cpu.",
        ),
    ] = None
    max_length: Annotated[
        int | None,
        _machine(
            "--max-length",
            metavar="TOKENS",
            callback=within(1),
            help="Maximum length of prompt and answer together. Default: the model's own.",
        ),
    ] = None
    max_batch_size: Annotated[
        int,
        _machine("--max-batch-size", metavar="N", callback=within(1), help="How many requests are decoded together."),
    ] = 1
    max_ce_batch_size: Annotated[
        int,
        _machine("--max-ce-batch-size", metavar="N", callback=within(1), help="How many prompts are read together."),
    ] = 32
    kv_cache_dtype: Annotated[str, KV_CACHE_DTYPE] = "auto"
    speculative: Annotated[
        str,
        _machine(
            "--speculative",
            metavar="auto|off",
            help="Look up in prompt and answer what may come next, and compute it at once where that pays: the same "
            "answer, sooner. off: never.",
            **one_of(SPECULATIVE),
        ),
    ] = "auto"
    save_to_serialized_model_path: Annotated[
        Path | None,
        _model(
            "--save-to-serialized-model-path",
            metavar="FILE",
            autocompletion=completions.FILES.offered,
            help="Save the loaded model as one file that loads immediately.",
        ),
    ] = None
    serialized_model_path: Annotated[
        Path | None,
        _model(
            "--serialized-model-path",
            metavar="FILE",
            autocompletion=completions.SERIALIZED.offered,
            help="Load a file written by `pixtral export` or --save-to-serialized-model-path.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RequestFlags:
    """What is asked."""

    prompt: Annotated[
        str | None, _request("--prompt", "-p", metavar="TEXT", callback=whole_text, help="The question.")
    ] = None
    image: Annotated[
        list[str] | None,
        _request(
            "--image",
            "-i",
            metavar="PICTURE",
            autocompletion=completions.IMAGE.offered,
            help="A file, an http(s) URL, a data: URI, or - for standard input. Repeatable; the order is kept.",
        ),
    ] = None
    system: Annotated[
        str | None,
        _request(
            "--system",
            metavar="TEXT",
            callback=whole_text,
            help="Instructions on how to answer (the system prompt). default: those that the model brings.",
        ),
    ] = None
    messages: Annotated[
        str | None,
        _request(
            "--messages",
            metavar="FILE|-",
            autocompletion=completions.CONVERSATION.offered,
            help="A whole conversation: an OpenAI-style list of messages in JSON.",
        ),
    ] = None
    raw: Annotated[
        bool,
        _request(
            "--raw",
            help="Continue the text as it is, without a chat template. Control words in it become control tokens.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ThinkingFlags:
    """How hard to think before the answer."""

    reasoning_effort: Annotated[
        str | None,
        _request(
            "--reasoning-effort",
            metavar="none|high",
            help="How hard to think before answering, for models that can be told. Default: the model's own.",
            **one_of(("none", "high")),
        ),
    ] = None

    def check(self, request: RequestFlags) -> None:
        """Raises UsageError where no template would tell the model."""
        if request.raw and self.reasoning_effort is not None:
            raise UsageError("--raw and --reasoning-effort exclude each other: an effort needs a chat template.")

    def options(self) -> dict[str, Any]:
        """As keyword arguments of `Pixtral.chat`."""
        return {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How each token is chosen and when the answer ends."""

    max_new_tokens: Annotated[
        int,
        _answer(
            "--max-new-tokens",
            metavar="N",
            callback=token_limit,
            help="Maximum length of the answer. -1: until the context is full.",
        ),
    ] = -1
    top_k: Annotated[
        int | None,
        _answer(
            "--top-k",
            metavar="N",
            callback=within_option("top_k"),
            help="Choose among the N most likely tokens; 0 is off. "
            "Default: 1 (always the most likely), or off if --temperature is above 0.",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        _answer(
            "--temperature",
            metavar="T",
            callback=within_option("temperature"),
            help="0 always takes the most likely token, 1 follows the model, higher is more random.",
        ),
    ] = None
    top_p: Annotated[
        float,
        _answer(
            "--top-p",
            metavar="P",
            callback=within_option("top_p"),
            help="Choose among the most likely tokens that together have this probability.",
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        _answer(
            "--min-p",
            metavar="P",
            callback=within_option("min_p"),
            help="Leave out tokens whose probability is below this share of the most likely token's.",
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        _answer(
            "--repetition-penalty",
            metavar="X",
            callback=within_option("repetition_penalty"),
            help="Above 1 makes tokens less likely that have already occurred.",
        ),
    ] = 1.0
    seed: Annotated[
        int | None,
        _answer(
            "--seed",
            metavar="N",
            callback=within_option("seed"),
            help="With the same seed, the same tokens are chosen.",
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        _answer("--stop", metavar="TEXT", callback=stop_texts, help="End the answer before this text. Repeatable."),
    ] = None
    ignore_eos: Annotated[bool, _answer("--ignore-eos", help="Continue after the model's end-of-answer token.")] = False

    def options(self) -> dict[str, Any]:
        """The same as keyword arguments of `Pixtral.chat`."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"stop": tuple(self.stop or ())}


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """In which form the result is printed."""

    json: Annotated[bool, _output("--json", help="Print one JSON object.")] = False
    quiet: Annotated[bool, _output("--quiet", help="On standard error, print nothing but errors.")] = False

    def console(self) -> Console:
        """The console that prints in this form."""
        return Console(json=self.json, quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """What is told beside the answer."""

    no_reasoning: Annotated[
        bool, _output("--no-reasoning", help="Do not show what the model thinks before it answers.")
    ] = False
    stats: Annotated[bool, _output("--stats", help="Print token counts and speeds on standard error.")] = False
    logprobs: Annotated[
        bool,
        _output("--logprobs", help="Print each token's log-probability: in the JSON object, else on standard error."),
    ] = False
