"""A Reply in; its JSON object, its statistics line and its table of log-probabilities out. Pure, prints nothing."""

from __future__ import annotations

from typing import Any


def as_object(reply: Any) -> dict[str, Any]:
    """The object that `--json` prints; `logprobs` is there only when it was asked for."""
    value = {
        "model": reply.model,
        "text": reply.text,
        "token_ids": list(reply.token_ids),
        "prompt_token_ids": list(reply.prompt_token_ids),
        "finish_reason": reply.finish_reason,
        "usage": _picked(reply.usage, "prompt_tokens", "completion_tokens", "image_tokens"),
        "timings": _picked(
            reply.timings,
            "load_s",
            "first_token_s",
            "prefill_tokens_per_s",
            "decode_tokens_per_s",
            "total_s",
        ),
    }
    if reply.logprobs is not None:
        value["logprobs"] = [_logprob(entry) for entry in reply.logprobs]
    return value


def statistics(reply: Any) -> str:
    """One line: how many tokens, how fast. Rates are in tokens a second."""
    usage, timings = reply.usage, reply.timings
    pictures = f", {usage.image_tokens} of them pictures" if usage.image_tokens else ""
    parts = [
        f"prompt {counted(usage.prompt_tokens, 'token')}{pictures}, {_rate(timings.prefill_tokens_per_s)}",
        f"answer {counted(usage.completion_tokens, 'token')}, {_rate(timings.decode_tokens_per_s)}",
        f"first token after {timings.first_token_s:.2f} s",
        f"loaded in {timings.load_s:.2f} s",
        f"total {timings.total_s:.2f} s",
    ]
    return " | ".join(parts)


def logprob_table(reply: Any) -> str:
    """A line for every token of the answer: its log-probability, its id, its text."""
    return "\n".join(f"{entry.logprob:9.4f} {entry.token_id:7d}  {entry.token!r}" for entry in reply.logprobs or ())


def _logprob(entry: Any) -> dict[str, Any]:
    alternatives = {"top": [_logprob(other) for other in entry.top]} if entry.top else {}
    return _picked(entry, "token_id", "token", "logprob") | alternatives


def _picked(record: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and its noun: `1 token`, `3 tokens`."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def _rate(tokens_per_second: float | None) -> str:
    return f"{tokens_per_second:.1f}/s" if tokens_per_second else "-/s"
