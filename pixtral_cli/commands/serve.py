"""`pixtral serve`: serves a model over HTTP until a signal. Joins flags, model and server; knows no route."""

from __future__ import annotations

import json
import os
import shlex
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, NoReturn

from pixtral_cli.cli import console as printing
from pixtral_cli.cli.console import Console, table
from pixtral_cli.cli.loading import NO_REMOTE_CODE, label, load
from pixtral_cli.cli.options import SourceFlags
from pixtral_cli.commands.serve_flags import DefaultFlags, GuardFlags, LimitFlags, ListenFlags, ServedWeightFlags

if TYPE_CHECKING:
    from pixtral_cli.server.process import Loaded, Settings

EXAMPLES = """\
Examples:

\b
  pixtral serve --model-path tiny
  PIXTRAL_API_KEY=$(openssl rand -hex 16) pixtral serve --host 0.0.0.0
  pixtral serve --quantization-encoding q4_k --kv-cache-memory 8GiB --served-model-name pixtral

Any OpenAI client works with the base URL http://127.0.0.1:8000/v1, and a chat page is at http://127.0.0.1:8000.
After SIGTERM or Ctrl-C, running requests may finish; a second signal stops the server at once.
"""
GIB = 2**30


def serve(
    listen: ListenFlags,
    source: SourceFlags,
    defaults: DefaultFlags,
    guard: GuardFlags,
    limits: LimitFlags,
    weights: ServedWeightFlags,
) -> None:
    """Serve a model over HTTP, with OpenAI's API and a chat page."""
    console = Console(quiet=listen.quiet)
    if source.trust_remote_code:
        console.notice(NO_REMOTE_CODE)
    from pixtral_cli.server import process

    process.check_binding(listen.host, guard.api_key or (), guard.insecure)
    listener = process.listen(listen.host, listen.port)
    address = process.url(listen.host, listener)

    def start() -> Loaded:
        console.notice(f"loading {label(source, weights)}")
        wanted = {"kv_cache_memory": weights.kv_cache_memory, "image_cache_memory": weights.image_cache_memory}
        memory = {name: size for name, size in wanted.items() if size is not None}
        model = load(source, weights, console, **memory)
        model.engine.warm_up()  # else the first requests would wait for it
        names = tuple(listen.served_model_name or (model.name,))
        settings = _settings(names, listen, guard, limits, defaults)
        return process.assemble(model, settings, _banner(model, address, settings, weights.max_batch_size))

    terminal = process.Terminal(console.detail, printing.tell_error, _leave)
    process.serve(listener, start, listen.drain_timeout, terminal)


def _banner(model: Any, address: str, settings: Settings, batch: int) -> str:
    """What a person wants to know who has just started a server, and a first request to paste."""
    memory, limits, needs_key = model.memory, settings.limits, bool(settings.keys)
    rows = {
        "serving": f"{', '.join(settings.names)}: {model.encoding} on {model.device}, "
        f"{model.max_length:,} tokens of context",
        "address": f"{address} (chat page), {address}/v1 (OpenAI's API)",
        "memory": f"weights {_size(memory.weights)}, KV cache {_size(memory.kv_cache)} ({memory.kv_tokens:,} tokens"
        f"{'' if model.work.kv_cache_dtype == 'auto' else ' in ' + model.work.kv_cache_dtype}), "
        f"pictures' features {_size(memory.image_cache)}",
        "limits": f"{batch} requests at once, {limits.max_queue} waiting; "
        f"a request: up to {settings.max_body_bytes // 2**20} MiB, pictures up to {limits.max_images}",
        "key": "needed, but not by the page itself, /health and /ready" if needs_key else "none is asked for",
        "try": _curl_line(address, settings.names[0], needs_key),
    }
    return "\n".join(table([*rows.items()]))


def _curl_line(address: str, name: str, needs_key: bool) -> str:
    """A request to paste into a shell."""
    body = {"model": name, "max_tokens": 64, "messages": [{"role": "user", "content": "Hello!"}]}
    key = ' -H "Authorization: Bearer $PIXTRAL_API_KEY"' if needs_key else ""
    json_type = "-H 'Content-Type: application/json'"
    return f"curl {address}/v1/chat/completions {json_type}{key} -d {shlex.quote(json.dumps(body))}"


def _settings(
    names: tuple[str, ...], listen: ListenFlags, guard: GuardFlags, limits: LimitFlags, defaults: DefaultFlags
) -> Settings:
    from pixtral_cli.server.media_policy import MediaPolicy
    from pixtral_cli.server.process import Settings
    from pixtral_cli.server.service import Limits

    networks = tuple(ip_network(text) for text in guard.allow_private_media or ())
    return Settings(
        listen.host,
        names,
        Limits(limits.max_images, limits.max_queue),
        MediaPolicy(
            allowed_domains=tuple(guard.allow_media_domain or ()),
            private_networks=networks,
            media_path=guard.media_path,
        ),
        tuple(guard.api_key or ()),
        defaults.given(),
        limits.max_body_mib * 2**20,
    )


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def _leave(code: int) -> NoReturn:
    printing.restore_terminal()
    os._exit(code)
