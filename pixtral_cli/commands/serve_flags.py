"""The flags of `serve` alone, as Typer parameters in small frozen dataclasses. Knows no model and no server.

Their types stay real objects (no `from __future__ import annotations` here), because Typer reads them.
"""

from copy import copy
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pixtral_cli.cli.completions import FOLDER
from pixtral_cli.cli.flags import byte_count, networks, within
from pixtral_cli.cli.options import SamplingFlags, ThinkingFlags, WeightFlags

_server, _guard, _limit, _machine = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Server", "Access", "Limits", "Speed and memory")
)


def _option(flags: type, name: str, panel: str | None = None) -> Any:
    """The option `name` of another command's flags, under the heading `panel` if one is given."""
    option = copy(flags.__annotations__[name].__metadata__[0])
    option.rich_help_panel = panel or option.rich_help_panel
    return option


_default = partial(_option, SamplingFlags, panel="Answer, if a request does not say")


@dataclass(frozen=True, kw_only=True)
class ListenFlags:
    """Where the server is reached, and as what."""

    host: Annotated[
        str,
        _server(
            "--host",
            metavar="ADDRESS",
            help="The address to bind. One that others can reach needs a key, or --insecure.",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, _server("--port", metavar="N", callback=within(0, 65535), help="The port; 0 takes any free port.")
    ] = 8000
    served_model_name: Annotated[
        list[str] | None,
        _server(
            "--served-model-name",
            metavar="NAME",
            help="The model's name in requests. Default: the name that it is loaded by. Repeatable.",
        ),
    ] = None
    drain_timeout: Annotated[
        float,
        _server(
            "--drain-timeout",
            metavar="SECONDS",
            callback=within(0),
            help="How long running requests may take to finish after SIGTERM or Ctrl-C.",
        ),
    ] = 30.0
    quiet: Annotated[bool, _server("--quiet", help="On standard error, print nothing but errors.")] = False


@dataclass(frozen=True, kw_only=True)
class GuardFlags:
    """Who may ask, and what pictures a request may make the server read."""

    api_key: Annotated[
        list[str] | None,
        _guard(
            "--api-key",
            metavar="KEY",
            envvar="PIXTRAL_API_KEY",
            help="Require this key. Repeatable; in the variable, separate keys with white space.",
        ),
    ] = None
    insecure: Annotated[
        bool, _guard("--insecure", help="Let everybody who can reach --host use the server without a key.")
    ] = False
    allow_media_domain: Annotated[
        list[str] | None,
        _guard(
            "--allow-media-domain",
            metavar="NAME",
            help="Fetch pictures only from this host; *.example.org stands for its subdomains. Repeatable.",
        ),
    ] = None
    allow_private_media: Annotated[
        list[str] | None,
        _guard(
            "--allow-private-media",
            metavar="CIDR",
            callback=networks,
            help="Also fetch pictures from this private network. Repeatable.",
        ),
    ] = None
    media_path: Annotated[
        Path | None,
        _guard(
            "--media-path",
            metavar="DIR",
            autocompletion=FOLDER.offered,
            exists=True,
            file_okay=False,
            help="Requests may name picture files below this folder. Default: none.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LimitFlags:
    """What is too much."""

    max_queue: Annotated[
        int, _limit("--max-queue", metavar="N", callback=within(1), help="How many requests may wait; more get 429.")
    ] = 512
    max_images: Annotated[
        int, _limit("--max-images", metavar="N", callback=within(0), help="Maximum number of pictures in one request.")
    ] = 32
    max_body_mib: Annotated[
        int, _limit("--max-body-mib", metavar="N", callback=within(1), help="Maximum size of one request in MiB.")
    ] = 64


@dataclass(frozen=True, kw_only=True)
class ServedWeightFlags(WeightFlags):
    """As `WeightFlags`, for many requests at once."""

    max_batch_size: Annotated[int, _option(WeightFlags, "max_batch_size")] = 16
    kv_cache_memory: Annotated[
        int | None,
        _machine(
            "--kv-cache-memory",
            metavar="SIZE",
            parser=byte_count,
            help="Memory for keys and values, such as 8GiB. Default: as much as is free and useful.",
        ),
    ] = None
    image_cache_memory: Annotated[
        int | None,
        _machine(
            "--image-cache-memory",
            metavar="SIZE",
            parser=byte_count,
            help="Memory for the features of earlier pictures. Default: 512MiB.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DefaultFlags:
    """How tokens are chosen where a request does not say; None leaves it to the checkpoint, else greedy."""

    max_new_tokens: Annotated[int | None, _default("max_new_tokens")] = None
    top_k: Annotated[int | None, _default("top_k")] = None
    temperature: Annotated[float | None, _default("temperature")] = None
    top_p: Annotated[float | None, _default("top_p")] = None
    min_p: Annotated[float | None, _default("min_p")] = None
    repetition_penalty: Annotated[float | None, _default("repetition_penalty")] = None
    reasoning_effort: Annotated[
        str | None, _option(ThinkingFlags, "reasoning_effort", panel="Answer, if a request does not say")
    ] = None

    def given(self) -> dict[str, Any]:
        """Those that were given, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}
