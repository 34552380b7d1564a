"""What can go wrong for a user. One sentence each, and `hint`, the next thing to do.

PixtralError
├── ModelError      the checkpoint cannot be run as asked
│   └── BrokenLogits    it computes infinities, or what is no number
├── DeviceError     the device asked for is not there
├── RequestError    this request cannot be answered by this model
│   └── PromptTooLong   it has more tokens than the context
└── PromptError     messages, templates and pictures (pixtral_cli.prompt.errors)

weights_cache stands alone and has its own tree, `weights_cache.errors.WeightsError`.
"""

from __future__ import annotations


class PixtralError(Exception):
    """`str(error)` is one sentence for the user; `error.hint` says what to do next, or is None."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ModelError(PixtralError):
    """The checkpoint cannot be run as asked."""


class BrokenLogits(ModelError):
    """The model computed infinities, or what is no number, where the next token's scores should be."""

    def __init__(self) -> None:
        super().__init__(
            "The model computed no usable scores for the next token.",
            hint="Try another --quantization-encoding; if none helps, the files are damaged: get the model again.",
        )


class DeviceError(PixtralError):
    """The device asked for is not there, or is not understood."""


class RequestError(PixtralError):
    """The request does not fit the model: too long, or pictures for a text model."""


class PromptTooLong(RequestError):
    """The prompt leaves no room in the context for an answer."""


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own, torch's on a GPU, and torch's on the CPU, which is a RuntimeError known only by its text."""
    said = str(error).lower()
    words = "out of memory", "not enough memory", "can't allocate memory"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in said for word in words))


def reason_of(error: Exception) -> str:
    """What an exception says, on one line and without a full stop."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    visible = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(visible.split()).rstrip(".") or type(error).__name__
