"""Request flags and standard input in, one request out: messages for chat, or a raw prompt. Loads no model."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixtral_cli.cli.flags import UsageError
from pixtral_cli.cli.options import RequestFlags
from pixtral_cli.commands.piped_text import LIMIT, PipedText
from pixtral_cli.errors import PixtralError

LEAVE_OUT = "Leave one of them out."
NOTHING_ASKED = "There is no prompt."
MESSAGES_LOOK = 'They look like [{"role": "user", "content": "Hello"}].'
HOW_TO_ASK = 'Give one with -p "...", on standard input, or a conversation with --messages FILE.'


@dataclass(frozen=True)
class Request:
    """`messages` for a chat, or, where it is None, `prompt` and `pictures` for a raw completion."""

    messages: Any = None
    """A list of dictionaries, or a Conversation."""
    prompt: str = ""
    pictures: list[Any] = field(default_factory=list)


class PendingRequest:
    """A request that is whole but for text that may yet come on standard input.

    Making one checks everything that can be checked before a model is loaded: flags that exclude each other,
    the form of the messages, and that every picture opens. Raises UsageError, PromptError, PixtralError.
    """

    def __init__(self, flags: RequestFlags) -> None:
        _check(flags)
        self._flags = flags
        self._messages = None if flags.messages is None else _opened_messages(_read_json(flags.messages))
        self._pictures = [_opened(source) for source in flags.image or ()]
        takes_text = self._messages is None and "-" not in (flags.image or ())
        self._piped = PipedText() if takes_text else None
        self._text = self._text_without_prompt() if not flags.prompt and takes_text else None
        if self._messages is None and not (flags.prompt or self._text):
            raise UsageError(NOTHING_ASKED, HOW_TO_ASK)

    @property
    def silent_writer(self) -> bool:
        """Whether a program in the pipeline was given up on, having said nothing."""
        return self._piped is not None and self._piped.silent_writer

    def finish(self) -> Request:
        """The request, with the text that has come by now. To be called once, when the model is loaded."""
        if self._messages is not None:
            return Request(messages=self._messages)
        if self._text is None:
            self._text = self._piped.if_any() if self._piped else ""
        text = "\n\n".join(part for part in (self._text, self._flags.prompt) if part)
        if self._flags.raw:
            return Request(prompt=text, pictures=self._pictures)
        return Request(messages=_conversation(self._flags.system, self._pictures, text))

    def _text_without_prompt(self) -> str:
        assert self._piped is not None
        return self._piped.now()


def _check(flags: RequestFlags) -> None:
    beside = [
        name
        for name, value in (("--prompt", flags.prompt), ("--image", flags.image), ("--system", flags.system))
        if value is not None and value != []
    ]
    if flags.messages is not None and flags.raw:
        raise UsageError("--raw and --messages exclude each other: messages need a chat template.", LEAVE_OUT)
    if flags.messages is not None and beside:
        raise UsageError(
            f"{beside[0]} and --messages exclude each other: the messages are the whole request.", LEAVE_OUT
        )
    if flags.raw and flags.system is not None:
        raise UsageError("--raw and --system exclude each other: a system text needs a chat template.", LEAVE_OUT)
    if (flags.image or []).count("-") > 1:
        raise UsageError(
            "Standard input can be read only once, and --image - is given twice.", "Give the other picture's path."
        )


def _conversation(system: str | None, pictures: list[Any], text: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": picture} for picture in pictures]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
    return [{"role": "system", "content": system}, user] if system else [user]


def _read_json(name: str) -> Any:
    """What the messages' file, or standard input, holds."""
    where = "standard input" if name == "-" else name or "a file without a name"
    try:
        return json.loads(_limited(name, where))
    except OSError as error:
        raise PixtralError(
            f"The messages in {where} cannot be read: {error.strerror}.",
            "Check the path; --messages - reads standard input.",
        ) from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a NUL in the name; nested thousands deep
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise PixtralError(f"The messages in {where} are not JSON: {reason}.", MESSAGES_LOOK) from error


def _limited(name: str, where: str) -> bytes:
    if name == "-" and sys.stdin is None:
        raise UsageError("--messages - reads standard input, which is closed.", "Send the messages through a pipe.")
    with nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise PixtralError(
            f"The messages in {where} have more than {LIMIT // 2**20} MiB.",
            "Name pictures by their paths in place of data: URIs.",
        )
    return data


def _opened_messages(messages: Any) -> Any:
    """The Conversation of the messages, with the pictures themselves as their sources: each is opened once, here."""
    from pixtral_cli.prompt.messages import parse

    conversation = parse(messages)
    return conversation.with_sources([_opened(picture.source, picture.where) for picture in conversation.images])


def _opened(source: Any, where: str | None = None) -> Any:
    """What stands for the picture, which was checked; `where` is the entry of the messages that names it."""
    from pixtral_cli.prompt.errors import ImageError, InvalidMessages
    from pixtral_cli.prompt.media import checked

    try:
        return checked(source)
    except ImageError as error:
        if where is None:
            raise
        raise InvalidMessages(where, str(error).rstrip("."), error.hint) from error
