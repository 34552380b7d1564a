"""Whatever went wrong with a request in, what its sender is told out; knows no routes."""

from __future__ import annotations

from pixtral_cli.errors import PixtralError, RequestError
from pixtral_cli.prompt.errors import InvalidEntry, NoChatTemplate, PromptError, TemplateFailed, TokenizerUnreadable
from pixtral_cli.server.errors import ApiError

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
RAW = "Use /v1/completions to write the prompt yourself."


def refusal_of(error: Exception) -> ApiError:
    """400 for what the sender can change, with the sentence and the hint; else 500, which tells nothing of inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | PromptError) and not isinstance(error, TokenizerUnreadable):
        param = error.where if isinstance(error, InvalidEntry) else None
        return ApiError(400, _joined(error), param=param, code="invalid_value")
    if _is_memory(error):
        sentence = "The server has not enough memory for this request. Send a shorter one, or try again later."
        return ApiError(500, sentence, "server_error", code="out_of_memory")
    if isinstance(error, PixtralError):
        return ApiError(500, str(error), "server_error", code="model_error")
    return ApiError(500, "The server failed to answer this request.", "server_error", code="internal_error")


def _joined(error: PixtralError) -> str:
    hint = RAW if isinstance(error, TemplateFailed | NoChatTemplate) else error.hint
    return f"{error} {hint}" if hint else str(error)


def _is_memory(error: Exception) -> bool:
    """Torch's error for the CPU is a plain RuntimeError."""
    said = str(error).lower()
    is_torch = isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or is_torch
