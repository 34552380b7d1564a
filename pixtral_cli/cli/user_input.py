"""What a person asks on a command line: flags and standard input in, messages or a raw prompt out. Knows no model.

Text on standard input goes before the prompt. A terminal, a device or a closed input gives nothing; a file is read.
A pipe with nothing in it could be a slow program (`pdftotext x.pdf - | pixtral run -p …`) or merely what this
process inherited from a shell script, cron or a supervisor, which will never say a word. So:

- without any other request the input *is* the request: wait for it;
- beside a prompt, look again when the model is loaded. Something there: read it to its end. Nothing: if the
  writer is a program next to this one (not one of those that started it), give it PATIENCE seconds from the
  start, else GRACE; then go on without.
"""

from __future__ import annotations

import json
import os
import select
import stat
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixtral_cli.cli.console import Console
from pixtral_cli.cli.flags import UsageError
from pixtral_cli.cli.options import RequestFlags
from pixtral_cli.errors import PixtralError

if TYPE_CHECKING:
    from pixtral_cli.api import Pixtral
    from pixtral_cli.generation import TextEvent

DEFAULT = "default"
"""Stands for the system prompt that a repository brings."""
GRACE = 0.5
"""Seconds, from the start, in which an inherited pipe may begin to speak."""
PATIENCE = 10.0
"""Seconds, from the start, in which a program in the same pipeline may begin to speak."""
LIMIT = 64 * 2**20
"""Bytes of text, or of messages, that are read at most: far more than any context holds."""
SILENT_PIPE = (
    "nothing came on standard input in time, so the prompt goes alone. "
    "To wait however long it takes, send the prompt that way too, without -p."
)
LEAVE_OUT = "Leave one of them out."
HOW_TO_ASK = 'Give one with -p "...", on standard input, or a conversation with --messages FILE.'
MESSAGES_LOOK = 'They look like [{"role": "user", "content": "Hello"}].'


@dataclass(frozen=True)
class UserInput:
    """`messages` for a chat, or, where it is None, `prompt` and `images` for a raw completion."""

    messages: Any = None
    """A list of dictionaries, or a Conversation."""
    prompt: str = ""
    images: list[Any] = field(default_factory=list)

    def stream(self, model: Pixtral, **options: Any) -> Generator[TextEvent]:
        """The events of the answer, as the model makes them."""
        if self.messages is None:
            return model.stream_complete(self.prompt, self.images, **options)
        return model.stream(self.messages, **options)


class PendingInput:
    """What is asked, whole but for text that may yet come on standard input.

    Making one checks everything that can be checked before a model is loaded: flags that exclude each other,
    the form of the messages, and that every image opens. Raises UsageError, PromptError, PixtralError.
    """

    def __init__(self, flags: RequestFlags) -> None:
        _check(flags)
        self._flags = flags
        self._messages = None if flags.messages is None else _opened_messages(_read_messages(flags.messages))
        self._images = [_opened(source) for source in flags.image or ()]
        takes_text = self._messages is None and "-" not in (flags.image or ())
        self._piped = PipedText() if takes_text else None
        self._text = self._piped.now() if self._piped and not flags.prompt else None
        if self._messages is None and not (flags.prompt or self._text):
            raise UsageError("There is no prompt.", HOW_TO_ASK)

    def finish(self, console: Console, own_system: Callable[[], dict[str, Any]]) -> UserInput:
        """The same with the text that has come by now. To be called once, when the model is loaded; `own_system` gives
        the system message that it brings, if that is asked for, and raises ModelError if there is none."""
        if self._messages is not None:
            return UserInput(messages=self._messages)
        if self._text is None and self._piped:
            self._text = self._piped.if_any()
            if self._piped.silent_writer:
                console.notice(SILENT_PIPE)
        text = "\n\n".join(part for part in (self._text, self._flags.prompt) if part)
        if self._flags.raw:
            return UserInput(prompt=text, images=self._images)
        images = [{"type": "image", "image": image} for image in self._images]
        content = [*images, {"type": "text", "text": text}] if images else text
        return UserInput([*self._system(own_system), {"role": "user", "content": content}])

    def _system(self, own_system: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        text = self._flags.system
        if text == DEFAULT:
            return [own_system()]
        return [{"role": "system", "content": text}] if text else []


def _check(flags: RequestFlags) -> None:
    given = {"--prompt": flags.prompt, "--image": flags.image, "--system": flags.system}
    beside = [name for name, value in given.items() if value is not None and value != []]
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


def _read_messages(name: str) -> Any:
    """What the file of that name, or standard input, holds as JSON."""
    if name == "-" and sys.stdin is None:
        raise UsageError("--messages - reads standard input, which is closed.", "Send the messages through a pipe.")
    where = "standard input" if name == "-" else name or "a file without a name"
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as file:
            data = file.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise PixtralError(
                f"The messages in {where} have more than {LIMIT // 2**20} MiB.",
                "Name pictures by their paths in place of data: URIs.",
            )
        return json.loads(data)
    except OSError as error:
        raise PixtralError(
            f"The messages in {where} cannot be read: {error.strerror}.",
            "Check the path; --messages - reads standard input.",
        ) from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a NUL in the name; nested thousands deep
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise PixtralError(f"The messages in {where} are not JSON: {reason}.", MESSAGES_LOOK) from error


def _opened_messages(messages: Any) -> Any:
    """The Conversation of the messages, with the images themselves as their sources: each is opened once, here."""
    from pixtral_cli.prompt.messages import parse

    conversation = parse(messages)
    return conversation.with_sources([_opened(image.source, image.where) for image in conversation.images])


def _opened(source: Any, where: str | None = None) -> Any:
    """What stands for the image, which was checked; `where` is the entry of the messages that names it."""
    from pixtral_cli.prompt.errors import ImageError, InvalidMessages
    from pixtral_cli.prompt.media import checked

    try:
        return checked(source)
    except ImageError as error:
        if where is None:
            raise
        raise InvalidMessages(where, str(error).rstrip("."), error.hint) from error


class PipedText:
    """The text on standard input, if there is any; `silent_writer` tells afterwards of a pipe given up on."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._kind = _kind_of_stdin()
        self.silent_writer = False

    def now(self) -> str:
        """The text, waited for however long it takes. Raises UsageError when it is not text."""
        return _read_text() if self._kind else ""

    def if_any(self) -> str:
        """The text, or "" when nothing has come by the time that the module's rule allows."""
        if self._kind == "pipe" and not self._speaks_within(GRACE):
            self.silent_writer = _written_by_a_neighbour()
            if not self.silent_writer or not self._speaks_within(PATIENCE):
                return ""
            self.silent_writer = False
        return self.now()

    def _speaks_within(self, seconds: float) -> bool:
        """Whether a byte or the end of the input comes within that time from the start."""
        poll = select.poll()
        poll.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
        return bool(poll.poll(max(0.0, self._started + seconds - time.monotonic()) * 1000))


def _kind_of_stdin() -> str | None:
    """`file`, `pipe` (or a socket), or None for what is never read."""
    with suppress(OSError, ValueError, AttributeError):  # closed, or replaced by something without a descriptor
        mode = os.fstat(sys.stdin.fileno()).st_mode
        if stat.S_ISREG(mode):
            return "file"
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            return "pipe"
    return None


def _read_text() -> str:
    """Standard input to its end, without the last line's end; "" where it is blank."""
    data = bytearray()
    while len(data) <= LIMIT and (read := os.read(sys.stdin.fileno(), 2**20)):
        data += read  # between two reads an interrupt is noticed
    if len(data) > LIMIT:
        raise UsageError(f"Standard input holds more than {LIMIT // 2**20} MiB of text.", "Send less of it.")
    try:
        text = data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"Standard input is not UTF-8 text (byte {error.start + 1}).",
            "For a picture, write: --image - ; other text becomes UTF-8 with: iconv -f latin1 -t utf-8",
        ) from error
    return text if text.strip() else ""


def _written_by_a_neighbour() -> bool:
    """Whether a process that did not start this one can write to its standard input (Linux; else False)."""
    with suppress(OSError):
        target = os.readlink(f"/proc/self/fd/{sys.stdin.fileno()}")
        kin = {os.getpid(), *_ancestors(os.getpid())}
        processes = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
        return any(_can_write(pid, target) for pid in processes if pid not in kin)
    return False


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        # "pid (name) state parent …", and the name may hold spaces and brackets
        pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        yield pid


def _can_write(pid: int, target: str) -> bool:
    with suppress(OSError):  # gone meanwhile, or another user's
        for number in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{number}") == target:
                flags = Path(f"/proc/{pid}/fdinfo/{number}").read_text().partition("flags:")[2].split()[0]
                if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    return False
