"""A model's name in, what can be known before its weights out: config, tokenizer, prompts. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path, PurePath
from typing import Any, cast

from pixtral_cli.errors import ModelError, PixtralError, RequestError, reason_of
from pixtral_cli.known_models import BUILT_IN
from pixtral_cli.model import families, free_memory, memory, native_library
from pixtral_cli.model.config import ModelConfig
from pixtral_cli.model.free_memory import Device
from pixtral_cli.model.memory import Need
from pixtral_cli.model.placement import Placement, place
from pixtral_cli.prompt import system_prompt
from pixtral_cli.prompt.cropped import CroppedSpec
from pixtral_cli.prompt.image import ImageSpec, Recipe
from pixtral_cli.prompt.messages import Conversation, parse
from pixtral_cli.prompt.model_settings import ModelSettings
from pixtral_cli.prompt.processor import Processor, Prompt
from pixtral_cli.prompt.thoughts import ThoughtMarks
from pixtral_cli.prompt.tools import parse_tools
from weights_cache import cache, checkpoint, file_kind, hub, weight_files
from weights_cache.checkpoint import Checkpoint, Form, SerializedCheckpoint
from weights_cache.encodings import Encoding
from weights_cache.errors import WriteFailed
from weights_cache.formats import serialized, serialized_writer
from weights_cache.progress import Progress
from weights_cache.wording import EXPORT_AGAIN, FETCH_AGAIN, get_again


@dataclass(frozen=True)
class Source:
    """An opened model. `image_preprocessing` is a recipe's name, or None for the checkpoint's own."""

    name: str
    checkpoint: Checkpoint
    image_preprocessing: str | None = None

    @classmethod
    def open(
        cls,
        model_path: str | PathLike[str] | None,
        weight_paths: Sequence[str | PathLike[str]] = (),
        *,
        weights: bool = True,
        weights_format: Form | None = None,
        image_preprocessing: str | None = None,
        force_download: bool = False,
        progress: Progress | None = None,
    ) -> Source:
        """Find the model, fetching it from the Hub if need be; without `weights`, its small files only.

        Without `model_path`, a GGUF file among `weight_paths` brings its own config and tokenizer. `weights_format`
        chooses where a folder holds the model in several forms. Raises weights_cache.errors.WeightsError.
        """
        name, paths = None if model_path is None else fspath(model_path), [Path(path) for path in weight_paths]
        weight_files.check_present(paths)  # before anything is asked of the Hub
        folder: Path | None = None
        notes: list[str] = []
        if name == BUILT_IN:
            from pixtral_cli.tiny import FOLDER

            folder = FOLDER
        elif name is not None:
            folder = hub.fetch(
                name,
                weights=weights and not paths,
                headers=not weights and not paths,
                form=weights_format,
                force=force_download,
                progress=progress,
                tell=notes.append,
                accepts=families.read_config,
            )
        opened = checkpoint.open(folder, paths, weights_format, weights=weights)
        opened.note = " ".join(notes) or opened.note  # of the same choice, if both tell of one
        return cls(name or opened.folder.name, opened, image_preprocessing)

    @classmethod
    def open_headers(
        cls, name: str, folder: Path, *, weights_format: Form | None = None, progress: Progress | None = None
    ) -> Source:
        """A model of which no weights are read: one that is not here leaves its headers in `folder`."""
        if name == BUILT_IN:
            return cls.open(name)
        notes: list[str] = []
        found = hub.fetch_headers(
            name, folder, form=weights_format, progress=progress, tell=notes.append, accepts=families.read_config
        )
        if found.is_file() and file_kind.of(found) != "gguf":
            return cls.open_serialized(found, weights=False)
        opened = checkpoint.open(found, form=weights_format)
        opened.note = " ".join(notes) or opened.note
        return cls(name, opened)

    @staticmethod
    def fetch(
        name: str,
        *,
        weights_format: Form | None = None,
        force_download: bool = False,
        progress: Progress | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> Path:
        """The folder or file of the whole model, downloaded if need be and not opened. Raises WeightsError, and
        ModelError for a config that cannot be run."""
        if name == BUILT_IN:
            return Source.open(name).checkpoint.folder
        return hub.fetch(
            name, form=weights_format, force=force_download, progress=progress, tell=tell, accepts=families.read_config
        )

    @staticmethod
    def is_serialized(name: str) -> bool:
        """Whether the name is that of a serialized model's file."""
        return name != BUILT_IN and serialized.is_serialized(Path(name))

    @classmethod
    def open_serialized(
        cls,
        path: str | PathLike[str],
        image_preprocessing: str | None = None,
        *,
        weights: bool = True,
        progress: Progress | None = None,
    ) -> Source:
        """A serialized model: the file is all that is needed; without `weights`, they are not checked. Raises
        weights_cache.errors.WeightsError."""
        opened = SerializedCheckpoint(Path(path), weights=weights, progress=progress)
        return cls(opened.model_name, opened, image_preprocessing)

    @cached_property
    def config(self) -> ModelConfig:
        with self._advising():
            return families.read_config(self.checkpoint.config)

    @contextmanager
    def _advising(self) -> Iterator[None]:
        """Inside, an error whose hint is to fetch the model again says how this one is got again: what was never
        fetched has to be copied or exported."""
        try:
            yield
        except PixtralError as error:
            if error.hint and error.hint.startswith(FETCH_AGAIN):
                again = EXPORT_AGAIN if self.format == "serialized" else get_again(self.checkpoint.folder)
                error.hint = again + error.hint.removeprefix(FETCH_AGAIN)
            raise

    def needs(self, kv_cache_dtype: str = "auto") -> list[Need]:
        """What the model takes in each encoding that it can be loaded in, from headers alone: a serialized model in its
        own only. Raises ModelError and WeightsError."""
        found = memory.needs(self.checkpoint.tensors, self.config, kv_cache_dtype)
        return found[:1] if self.format == "serialized" else found

    def devices(self) -> list[Device]:
        """This machine's devices and what is free on them."""
        return free_memory.devices()

    def kernels(self, device: Device) -> str | None:
        """Which kernels multiply on a CPU, in a few words: "avx512bf16"; None of a GPU, see `device_notes`."""
        return native_library.words() if device.kind == "cpu" else None

    def device_notes(self) -> list[str]:
        """A sentence for whatever makes the devices of this machine slower than they could be, or of no use. Imports
        torch if there are GPUs."""
        if all(device.kind == "cpu" for device in self.devices()):
            return native_library.notes()
        from pixtral_cli.model import slower_paths

        return [*native_library.notes(), *slower_paths.notes_of_this_machine()]

    @property
    def format(self) -> str:
        """How the model is stored: a form, or "serialized"."""
        return "serialized" if isinstance(self.checkpoint, SerializedCheckpoint) else self.checkpoint.form

    def placement(self, wanted: Encoding | None, quantize_vision: bool = False) -> Placement:
        """Which encoding each tensor gets. Raises ModelError when a serialized model has another than is wanted,
        when there is nothing to pack the picture part into, and when scales are to be packed that stay as they are."""
        opened = self.checkpoint
        if quantize_vision and not (wanted and wanted.packed):
            asked = wanted.name if wanted else "no encoding"
            raise ModelError(
                f"The picture part is packed into the encoding that is asked for, and that is {asked}.",
                hint="Ask for a --quantization-encoding such as q4_k, or leave --quantize-vision out.",
            )
        if wanted is not None and isinstance(opened, SerializedCheckpoint) and wanted.name != opened.encoding:
            raise ModelError(
                f"{opened.folder} was saved in {opened.encoding}, and {wanted.name} is asked for.",
                hint="Leave --quantization-encoding out, or export the model again from its checkpoint.",
            )
        placed = place(opened.tensors, wanted, quantize_vision)
        kept = next((name for name, info in opened.tensors.items() if info.encoding == "nf4"), None)
        if placed.double_quantization and kept and not getattr(opened.weight(kept), "nested", False):
            raise ModelError(
                f"The weights of {opened.folder} are in nf4 already, and their scales are not packed.",
                hint="Leave --double-quantization out, or encode the model's own weights, which are not packed.",
            )
        return placed

    def save(
        self,
        path: Path,
        placement: Placement,
        tensor_of: Callable[[str], Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write a serialized model in `placement`; `tensor_of` gives stored tensors that are in memory already.

        Raises weights_cache.errors.DiskFull or WriteFailed; an unfinished file is never left behind.
        """
        from pixtral_cli.model import save
        from pixtral_cli.model.load import check_names, empty, encoded

        opened = self.checkpoint
        if path.resolve() in {info.file.resolve() for info in opened.tensors.values()}:
            raise WriteFailed(path, "it is what the model is read from")
        names = check_names(empty(self.config), opened)
        weights = save.weights(opened, names, placement, tensor_of or (lambda name: encoded(opened, name, placement)))
        files = opened.side_files()
        serialized_writer.write(
            path, weights, files, model=self.name, form=opened.form, encoding=placement.label, progress=progress
        )
        cache.write_stamp(path, serialized.SerializedFile(path).seal)

    @cached_property
    def processor(self) -> Processor:
        with self._advising():
            return self._processor()

    def _processor(self) -> Processor:
        layout = self.config.image_layout
        recipe = cast("Recipe | None", self.image_preprocessing)  # the processor refuses what is none
        if layout is None:
            return Processor.from_checkpoint(self.checkpoint, image_preprocessing=recipe)
        processor = Processor.from_checkpoint(
            self.checkpoint,
            image_preprocessing=recipe,
            spec=CroppedSpec(layout.token_size, layout.longest_side, own_tokens=layout.own_tokens)
            if layout.cropped
            else ImageSpec(layout.token_size, layout.longest_side),
            image_token_id=self.config.image_token_id,
        )
        tokens = processor.image_tokens
        if tokens is None or tokens.patch != self.config.image_token_id:
            raise ModelError(
                f"config.json says that pictures are token {self.config.image_token_id}, "
                f"and the tokenizer says {tokens.patch if tokens else 'nothing of pictures'}.",
                hint="The model's config.json and tokenizer files may be of different models.",
            )
        return processor

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """What ends an answer: by generation_config.json, else config.json, else the tokenizer."""
        checkpoint = self.checkpoint
        sections = checkpoint.generation_config, checkpoint.config, checkpoint.config.get("text_config", {})
        for section in sections:
            ends = section.get("eos_token_id") if isinstance(section, dict) else None
            if ends is not None:
                with self._advising():
                    return self._checked_ends(ends if isinstance(ends, list) else [ends])
        eos = self.processor.tokenizer.eos_id
        return frozenset() if eos is None else frozenset([eos])

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Conversation,
        tools: Sequence[dict[str, Any]] | None = None,
        settings: ModelSettings | None = None,
    ) -> Prompt:
        """The prompt for OpenAI-style messages (see `parse`) and tools. Raises PromptError or RequestError."""
        offered = () if tools is None else parse_tools(tools)
        conversation = parse(messages)
        self._check_images(len(conversation.images))
        with self._advising():
            return self.processor.chat(conversation, offered, settings)

    def system_message(self) -> dict[str, Any]:
        """What the repository's SYSTEM_PROMPT.txt tells its model, as a message, with name and date filled in.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        path = self.checkpoint.file(system_prompt.FILE)
        if path is None:
            raise ModelError(
                f"{self.name} brings no {system_prompt.FILE}.",
                hint="Write the text itself, or fetch the model again by --force-download if its repository has one.",
            )
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeError) as error:
            raise ModelError(f"{path} cannot be read: {reason_of(error)}.", hint=f"{FETCH_AGAIN}.") from error
        marks = ThoughtMarks.controls(self.processor.tokenizer)
        shows_thoughts = marks is not None and marks.begin == "[THINK]"
        today = datetime.now().date()  # noqa: DTZ005  of the user
        return system_prompt.message(text, PurePath(self.name).name, today, shows_thoughts=shows_thoughts)

    def complete(self, prompt: str, images: Sequence[Any] = ()) -> Prompt:
        """The prompt for a raw text after images: see `Processor.complete`. Raises PromptError or RequestError."""
        completed = self.processor.complete(prompt, images)
        self._check_images(len(completed.images))
        return completed

    def _check_images(self, images: int) -> None:
        if images and self.config.vision is None:
            raise RequestError(
                f"{self.name} is a text model and cannot look at pictures.",
                hint="Leave the picture out, or choose a model that looks at pictures.",
            )

    def _checked_ends(self, ends: list[Any]) -> frozenset[int]:
        vocab_size = self.config.text.vocab_size
        for end in ends:
            if isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < vocab_size:
                raise ModelError(
                    f"The model's configuration says eos_token_id = {end!r}, which is none of its {vocab_size} tokens.",
                    hint=f"{FETCH_AGAIN}, or mend its generation_config.json.",
                )
        return frozenset(ends)
