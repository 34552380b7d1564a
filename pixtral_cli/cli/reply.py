"""A model's Reply in; its JSON object, statistics and log-probabilities on the console out. Computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pixtral_cli.cli.console import Console, counted
from pixtral_cli.cli.options import ReportFlags

if TYPE_CHECKING:
    from pixtral_cli.generation import Reply, TokenLogprob


def tell(reply: Reply, kernels: str, console: Console, report: ReportFlags) -> None:
    """Print what comes after the answer's text: the JSON object, or log-probabilities; and statistics, which say what
    `kernels` have multiplied."""
    if console.json:
        value = as_object(reply, kernels)
        if report.no_reasoning:
            value.pop("reasoning_content", None)
        console.object(value)
    elif report.logprobs:
        lines = (f"{entry.logprob:9.4f} {entry.token_id:7d}  {entry.token!r}" for entry in reply.logprobs or ())
        console.detail("\n".join(lines))
    if report.stats:
        console.detail(statistics(reply, kernels))


def as_object(reply: Reply, kernels: str) -> dict[str, Any]:
    """The object that `--json` prints; `logprobs` is there only when it was asked for, and `reasoning_content` when the
    model thought."""
    usage, timings = reply.usage, reply.timings
    value = {
        "model": reply.model,
        "text": reply.text,
        "token_ids": list(reply.token_ids),
        "prompt_token_ids": list(reply.prompt_token_ids),
        "finish_reason": reply.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "image_tokens": usage.image_tokens,
            "proposed_tokens": usage.proposed_tokens,
            "accepted_tokens": usage.accepted_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
        },
        "timings": {
            "load_s": timings.load_s,
            "first_token_s": timings.first_token_s,
            "prefill_tokens_per_s": timings.prefill_tokens_per_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
            "total_s": timings.total_s,
        },
        "kernels": kernels,
    }
    if reply.reasoning_content:
        value["reasoning_content"] = reply.reasoning_content
    if reply.logprobs is not None:
        value["logprobs"] = [_logprob(entry) for entry in reply.logprobs]
    return value


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    alternatives = {"top": [_logprob(other) for other in entry.top]} if entry.top else {}
    return {"token_id": entry.token_id, "token": entry.token, "logprob": entry.logprob} | alternatives


def statistics(reply: Reply, kernels: str) -> str:
    """One line: how many tokens, how fast, by what. Rates are in tokens a second."""
    usage, timings = reply.usage, reply.timings
    looked_up = f", looked up {usage.accepted_tokens} of {usage.proposed_tokens}" if usage.proposed_tokens else ""
    images = f", {usage.image_tokens} of them pictures" if usage.image_tokens else ""
    thoughts = f", {usage.reasoning_tokens} of them thoughts" if usage.reasoning_tokens else ""
    answer = counted(usage.completion_tokens, "token") + thoughts
    parts = [
        f"prompt {counted(usage.prompt_tokens, 'token')}{images}, {_rate(timings.prefill_tokens_per_s)}",
        f"answer {answer}{looked_up}, {_rate(timings.decode_tokens_per_s)}",
        f"first token after {timings.first_token_s:.2f} s",
        f"loaded in {timings.load_s:.2f} s",
        f"total {timings.total_s:.2f} s",
        f"kernels {kernels}",
    ]
    return " | ".join(parts)


def _rate(tokens_per_second: float | None) -> str:
    return f"{tokens_per_second:.1f}/s" if tokens_per_second else "-/s"
