"""What can be wrong with a request's messages, images or template; each error is one sentence and a next step."""

from __future__ import annotations

import re

from pixtral_cli.errors import PixtralError
from weights_cache.wording import FETCH_AGAIN

PASSWORD = re.compile(r"^(\w+://)[^/?#]*@")
"""The start of an address that holds a user's name and password; it is shown as its first group."""


class PromptError(PixtralError):
    """Base of every failure to turn messages and images into a prompt."""

    default_hint = "Check the messages and the pictures of the request."

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message, hint=hint or self.default_hint)


class InvalidEntry(PromptError):
    """Base of what can be wrong with one entry of a request; `.where` is e.g. ``messages[2].content[1]``."""

    def __init__(self, where: str, reason: str, hint: str | None = None):
        super().__init__(f"{where}: {reason}.", hint)
        self.where, self.reason = where, reason


class InvalidMessages(InvalidEntry):
    """An entry of the messages is not what it should be."""

    default_hint = (
        'Messages look like [{"role": "user", "content": "Hello"}]; content can also be a list of parts such as '
        '{"type": "text", "text": "Hello"} and {"type": "image", "path": "a.png"}.'
    )


class InvalidTools(InvalidEntry):
    """An entry of the tools is not what it should be; `.where` is e.g. ``tools[1].function.name``."""

    default_hint = 'Tools look like [{"type": "function", "function": {"name": "add", "parameters": {…}}}].'


class ImageError(PromptError):
    """Base of what can be wrong with one image; `.name` is what the user called it."""

    default_hint = "Check the picture, or leave it out."

    def __init__(self, name: str, sentence: str, hint: str | None = None):
        super().__init__(sentence, hint)
        self.name = name


class ImageNotFound(ImageError):
    """No file has that name."""

    default_hint = "Check the path; a relative path starts at the current folder."

    def __init__(self, name: str):
        super().__init__(name, f"No picture at {name}.")


class ImageUnreadable(ImageError):
    """The bytes are no image of a known format, or a damaged one."""

    default_hint = "Give a JPEG, PNG, WebP, GIF, TIFF or BMP file."

    def __init__(self, name: str, reason: str, hint: str | None = None):
        super().__init__(name, f"Cannot read the picture {name}: {reason}.", hint)
        self.reason = reason


class ImageDamaged(ImageUnreadable):
    """A decoder gave up; `.reason` is in its own words, which are not for strangers."""

    default_hint = "Download or copy it again."


class ImageRefused(ImageError):
    """A server's rules do not let the image in."""

    default_hint = "Send the picture itself, as a data: URI."

    def __init__(self, name: str, reason: str, hint: str | None = None):
        super().__init__(name, f"The picture {name} is refused: {reason}.", hint)
        self.reason = reason


class ImageTooLarge(ImageError):
    """The header states more pixels, or the download has more bytes, than the limit."""

    def __init__(self, name: str, sentence: str):
        super().__init__(name, sentence, "Scale the picture down; the model sees at most about a megapixel of it.")


class ImageFetchFailed(ImageError):
    """An address did not deliver: unreachable, an HTTP status, too slow."""

    default_hint = "Open the address in a browser to check it, or download the picture and give its path."

    def __init__(self, name: str, reason: str):
        super().__init__(name, f"Cannot fetch {name}: {reason}.")
        self.reason = reason


class TextTooLong(PromptError):
    """A text cannot fit into the context, which was found before all of it was tokenised."""

    def __init__(self, letters: int, room: int):
        super().__init__(
            f"A text of {letters:,} characters has more tokens than the context has room for, which is {room:,}.",
            hint="Shorten it.",
        )


class TokenizerUnreadable(PromptError):
    """The checkpoint has no tokenizer that can be read here."""

    default_hint = f"{FETCH_AGAIN}."


class TemplateFailed(PromptError):
    """The checkpoint's chat template refused the messages or is broken."""

    default_hint = "Use --raw (in Python: complete) to write the prompt yourself."


class ImagesPassedOver(TemplateFailed):
    """The checkpoint's chat template does not write one mark for each image."""

    def __init__(self, marks: int, images: int, mark: str):
        given = "1 picture" if images == 1 else f"{images} pictures"
        super().__init__(
            f"The model's chat template writes {marks} {mark} for {given}.",
            hint=f"Use --raw (in Python: complete) with one {mark} for each picture.",
        )


class NoChatTemplate(PromptError):
    """The model has neither a chat template nor the control tokens of one."""

    def __init__(self) -> None:
        super().__init__(
            "This model has no chat template.",
            hint="Use --raw (in Python: complete) to continue plain text.",
        )


class ImagesMisplaced(PromptError):
    """The prompt's image marks and the images given do not match."""

    def __init__(self, marks: int, images: int, mark: str):
        given = "1 picture was" if images == 1 else f"{images} pictures were"
        super().__init__(
            f"The prompt has {marks} {mark} but {given} given.",
            hint=f"Write one {mark} for each picture, or none: then the pictures come first.",
        )


class ImagesUnsupported(PromptError):
    """The model's tokenizer has no tokens for images."""

    def __init__(self) -> None:
        super().__init__(
            "This model reads text only, and a picture was given.",
            hint="Leave the picture out, or choose a model that sees, such as mistral-community/pixtral-12b.",
        )


class EffortUnknown(PromptError):
    """The model can be told how hard to think, and not in this word."""

    def __init__(self, effort: str, known: tuple[str, ...]):
        super().__init__(
            f"This model has no reasoning effort {effort!r}.", hint=f"Give {' or '.join(known)}, or leave it out."
        )


class PartRefused(PromptError):
    """Mistral's rules have no way to write a part of the conversation."""

    default_hint = "Leave it out of the messages."
