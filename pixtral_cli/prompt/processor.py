"""Conversations or raw text in, a Prompt (token ids and prepared images) out, as one checkpoint wants it.

Knows the checkpoint's side files and nothing of its tensors; imports torch only when pixels are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from pixtral_cli.prompt import gguf_tokenizer, media, tokenizer_files
from pixtral_cli.prompt.errors import (
    ImagesMisplaced,
    ImagesPassedOver,
    ImagesUnsupported,
    NoChatTemplate,
    PromptError,
)
from pixtral_cli.prompt.image import RECIPES, ImageSpec, PreparedImage, Recipe, prepare
from pixtral_cli.prompt.messages import Conversation, ImagePart
from pixtral_cli.prompt.mistral_format import MistralFormat, can_chat, knows_tools
from pixtral_cli.prompt.model_settings import ModelSettings
from pixtral_cli.prompt.side_file import SideFile
from pixtral_cli.prompt.template import ChatTemplate, find_template, template_in
from pixtral_cli.prompt.thoughts import ThoughtMarks
from pixtral_cli.prompt.tokenizer import TextOrId, Tokenizer
from pixtral_cli.prompt.tool_calls import CallForm
from pixtral_cli.prompt.tools import Tool

if TYPE_CHECKING:
    from weights_cache.checkpoint import Checkpoint

GIVE_TEXT = 'Continue a text with complete("..."); for messages there is chat.'
GIVE_IMAGES = 'Write images=["a.png", "b.png"].'
IMAGE_MARK = "[IMG]"
"""What stands for an image in a raw text, unless the image token has a name of its own."""
ChatFormat = ChatTemplate | MistralFormat
OpenImage = Callable[[Any], AbstractContextManager[Any]]
"""An image's source -> a context that gives an RGB PIL.Image: `media.opened`, or one that guards a server."""


@dataclass(frozen=True)
class Prompt:
    """What a model reads: every image token of `token_ids`, in order, is one patch group of `images`."""

    token_ids: list[int]
    images: list[PreparedImage]
    answer_starts_text: bool = True
    """Whether the answer is a text of its own, as in a chat, and not the middle of one: `ByteStream` asks for it."""
    tools: tuple[Tool, ...] = ()
    """What the answer may call, in the form `call_form`."""
    call_form: CallForm = "text"
    text: str | None = None
    """A raw prompt as it was written."""
    thought_marks: ThoughtMarks | None = None
    """What stands around the thoughts of the answer; None where they are not told from it."""
    thought_is_open: bool = False
    """Whether the answer begins within a thought."""

    @property
    def image_tokens(self) -> int:
        """Tokens that the images take, row breaks included."""
        return sum(image.tokens for image in self.images)


@dataclass(frozen=True)
class ImageTokens:
    """The control ids of an image's patches, row ends and end; the latter are None where tokens follow each other
    without rows. `mark` stands for an image in a raw text."""

    patch: int
    row_end: int | None = None
    end: int | None = None
    mark: str = IMAGE_MARK

    @classmethod
    def of(cls, tokenizer: Tokenizer, config: SideFile) -> ImageTokens | None:
        """Their names are Pixtral's unless processor_config.json has others."""
        names = (
            config.token("image_token", None) or "[IMG]",
            config.token("image_break_token", None) or "[IMG_BREAK]",
            config.token("image_end_token", None) or "[IMG_END]",
        )
        if any(name not in tokenizer.controls for name in names):
            return None
        patch, row_end, end = map(tokenizer.control, names)
        return cls(patch, row_end, end)

    @classmethod
    def alone(cls, tokenizer: Tokenizer, image_token_id: int | None) -> ImageTokens | None:
        """Of a model that has only the one token, whose id its config says."""
        names = [control.text for control in tokenizer.controls.values() if control.id == image_token_id]
        return cls(image_token_id, mark=names[0]) if names and image_token_id is not None else None

    def of_image(self, image: PreparedImage) -> list[int]:
        """The prompt tokens of one image."""
        return self.grid(image.rows, image.columns) if image.spec.has_rows else [self.patch] * image.features

    def grid(self, rows: int, columns: int) -> list[int]:
        """The prompt tokens of an image with rows.

        >>> ImageTokens(10, 12, 13).grid(rows=2, columns=3)
        [10, 10, 10, 12, 10, 10, 10, 13]
        """
        assert self.row_end is not None, self
        assert self.end is not None, self
        ids = ([self.patch] * columns + [self.row_end]) * rows
        ids[-1] = self.end
        return ids


@dataclass
class Processor:
    """Builds prompts for one checkpoint."""

    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    """None: the model completes text and has no chat."""
    image_tokens: ImageTokens | None
    recipe: Recipe
    spec: ImageSpec
    open_image: OpenImage = media.opened
    sizes_only: bool = False
    """Whether nobody will ask for pixels."""
    tell: Callable[[str], None] | None = None
    """Takes a sentence for whoever asks, about each image that is scaled down."""

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        image_preprocessing: Recipe | None = None,
        spec: ImageSpec | None = None,
        image_token_id: int | None = None,
        open_image: OpenImage = media.opened,
    ) -> Processor:
        """Read the tokenizer, template and image settings of a checkpoint.

        Args:
            image_preprocessing: "hf" or "native"; by default the checkpoint's form, and "hf" for a GGUF.
            spec: how the model wants its images; what the checkpoint's files say of them wins.
            image_token_id: the one token of a model whose images have no rows.
            open_image: makes an image's source an RGB PIL.Image, for as long as it is needed.

        Raises:
            TokenizerUnreadable: no tokenizer, or a damaged one.
            SideFileUnreadable: a damaged file of settings.
            PromptError: an unknown `image_preprocessing`.
        """
        recipe = image_preprocessing or ("native" if checkpoint.form == "native" else "hf")
        if recipe not in RECIPES:
            raise PromptError(f"There is no image preprocessing {recipe!r}.", "Choose hf or native.")
        written = checkpoint.written_tokenizer
        tokenizer = gguf_tokenizer.load(written) if written else tokenizer_files.load(checkpoint.file)
        processor_config = SideFile.read(checkpoint.file("processor_config.json"))
        spec = spec or ImageSpec()
        if not spec.has_rows and recipe != "hf":
            raise PromptError(f"This model's pictures are not prepared by the recipe {recipe}.", "Choose hf.")
        if tokenizer.longest_side and spec.has_rows:
            spec = replace(spec, longest_side=tokenizer.longest_side)
        if checkpoint.form == "hf":
            spec = spec.with_preprocessor(processor_config.section("image_processor"))
            spec = spec.with_preprocessor(SideFile.read(checkpoint.file("preprocessor_config.json")))
        return cls(
            tokenizer,
            _chat_format(checkpoint, tokenizer),
            ImageTokens.of(tokenizer, processor_config)
            if spec.has_rows
            else ImageTokens.alone(tokenizer, image_token_id),
            recipe,
            spec,
            open_image,
        )

    def chat(
        self, conversation: Conversation, tools: Sequence[Tool] = (), settings: ModelSettings | None = None
    ) -> Prompt:
        """The prompt that asks for the next answer, in which `tools` may be called, or for more of the last one.

        Raises:
            NoChatTemplate, TemplateFailed, PartRefused, EffortUnknown, ImagesUnsupported, ImageError.
        """
        were_called = any(message.tool_calls or message.role == "tool" for message in conversation.messages)
        chat_format = self._format_for(bool(tools) or were_called)
        conversation = chat_format.arranged(conversation)
        images = self._prepared(conversation.images)
        ids = self._filled(chat_format.encode(conversation, tools, settings), images)
        in_text = conversation.is_continued and conversation.messages[-1].text != ""
        marks = chat_format.thought_marks(conversation)
        return Prompt(
            ids,
            images,
            not in_text,
            tuple(tools),
            chat_format.call_form,
            thought_marks=marks,
            thought_is_open=marks is not None and marks.are_open(ids, self.tokenizer),
        )

    def complete(self, text: str, images: Sequence[Any] = ()) -> Prompt:
        """The prompt that continues `text`, without a template: BOS, unless it begins with it, and what is written.

        Control strings such as ``[INST]`` become control tokens, as in transformers' ``tokenizer(text)``. Texts of
        strangers therefore belong in a chat, where they stay text. Each ``[IMG]`` stands for an image; with images
        and no ``[IMG]`` they come first. Without images ``[IMG]`` is text: an image token always has an image.
        LLaVA's ``<image>`` is the same for its models.

        Raises:
            ImagesMisplaced: as many ``[IMG]`` as images are needed, or none.
            PromptError: `text` is no text, or `images` no list of images.
        """
        if not isinstance(text, str):
            raise PromptError(f"The text to continue should be a string, not {type(text).__name__}.", GIVE_TEXT)
        sources = _as_list(images)
        mark = self.image_tokens.mark if self.image_tokens else IMAGE_MARK
        parts = text.split(mark) if sources else [text]
        if len(parts) == 1:
            parts = [""] * len(sources) + parts
        if len(parts) != len(sources) + 1:
            raise ImagesMisplaced(len(parts) - 1, len(sources), mark)
        prepared = self._prepared([ImagePart(source) for source in sources])
        ids = self._filled(self._raw_ids(parts), prepared)
        if (bos := self.tokenizer.bos_id) is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return Prompt(ids, prepared, answer_starts_text=not (text or prepared), text=text)

    def _format_for(self, has_tools: bool) -> ChatFormat:
        """Mistral's own rules stand in for a template that passes over tools, as Pixtral-12B's does."""
        chosen = self.chat_format
        if chosen is None:
            raise NoChatTemplate
        if has_tools and isinstance(chosen, ChatTemplate) and not chosen.knows_tools and knows_tools(self.tokenizer):
            return MistralFormat(self.tokenizer, chosen.source)
        return chosen

    def _raw_ids(self, parts: Sequence[str]) -> list[int]:
        """The ids of a raw text, with one image token between each two parts of it."""
        mark = self.image_tokens.patch if self.image_tokens else None
        marked: list[TextOrId] = []
        for number, part in enumerate(parts):
            if number and mark is not None:
                marked.append(mark)
            marked += self.tokenizer.split_controls(part, but=mark)
        return self.tokenizer.encode_with_controls(marked)

    def _prepared(self, parts: Iterable[ImagePart]) -> list[PreparedImage]:
        images = []
        for number, part in enumerate(parts, start=1):
            images.append(image := self._made_small(part))
            if image.is_scaled_down and self.tell:
                (width, height), resized = image.original_size, f"{image.width}x{image.height}"
                self.tell(
                    f"picture {number} is scaled down from {width}x{height} to {resized} px: {image.tokens} tokens."
                )
        return images

    def _made_small(self, part: ImagePart) -> PreparedImage:
        """The large image is let go of before the next one is opened."""
        if self.image_tokens is None:
            raise ImagesUnsupported
        with self.open_image(part.source) as opened:
            image = prepare(opened, self.recipe, self.spec.at(part.detail))
            return replace(image, source=None) if self.sizes_only else image.compact()

    def _filled(self, ids: list[int], images: list[PreparedImage]) -> list[int]:
        """`ids` with each image's tokens in place of its mark."""
        tokens = self.image_tokens
        if tokens is None:
            return ids
        marks = ids.count(tokens.patch)
        if marks != len(images):
            raise ImagesPassedOver(marks, len(images), tokens.mark)
        filled: list[int] = []
        start = 0
        for image in images:
            mark = ids.index(tokens.patch, start)
            filled += ids[start:mark] + tokens.of_image(image)
            start = mark + 1
        return filled + ids[start:]


def _as_list(images: Any) -> list[Any]:
    """The images in a list; a single one is meant so."""
    if isinstance(images, str | bytes | PathLike) or media.is_image(images):
        return [images]
    if not isinstance(images, Iterable):
        raise PromptError(f"The pictures should be a list, not {type(images).__name__}.", GIVE_IMAGES)
    return list(images)


def _chat_format(checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatFormat | None:
    """A template that comes with the checkpoint is data; without one Mistral's rules, if the tokens are there."""
    written = checkpoint.written_tokenizer
    if checkpoint.form == "gguf":
        source = template_in(written and written.get("chat_template"))
    else:
        source = find_template(checkpoint.file) if checkpoint.form == "hf" else None
    if source is not None:
        is_processor = any(map(checkpoint.file, ("processor_config.json", "preprocessor_config.json")))
        return ChatTemplate(source, tokenizer, starts_with_bos=is_processor or written is not None)
    return MistralFormat(tokenizer) if can_chat(tokenizer) else None
