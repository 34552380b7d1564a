"""A repository's file names and a wish in, the files that are one whole model in one form out. Reads no file.

The same rules choose what to download and tell whether it is here, so that the two cannot disagree.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import layout
from .errors import ModelNotFound, WeightsNotFound, listed
from .layout import Form
from .own_cache import Listing

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""The small files that are fetched beside a config; the rest of a repository is left alone."""

GGUFS_SHOWN = 20
CONFIGS: dict[Form, str] = {"hf": layout.CONFIG, "native": layout.NATIVE_CONFIG}


@dataclass(frozen=True, slots=True)
class Selection:
    """`side` are the small files, the config last; `weights` are files, or one index that names them.

    `entry` is the GGUF file that is the model; in other forms the model is the folder. `note` tells of a choice.
    """

    form: Form
    side: tuple[str, ...]
    weights: tuple[str, ...]
    entry: str | None = None
    note: str | None = None

    @property
    def index(self) -> str | None:
        """The index that names the weights, if that is how they are given."""
        return next((name for name in self.weights if name in (layout.INDEX, layout.NATIVE_INDEX)), None)

    def path(self, folder: Path) -> Path:
        """What to open of the folder that holds the files."""
        return folder / self.entry if self.entry else folder


def select(
    where: str,
    files: Listing | Iterable[str],
    *,
    form: Form | None = None,
    file: str | None = None,
    weights: bool = True,
) -> Selection:
    """What of `files`, names or names -> sizes, is needed: in `form`, or the GGUF `file`, or the preferred form.

    Without `weights` a config is enough. Raises WeightsNotFound, PickleRefused or ModelNotFound, all with a way out.
    """
    sizes: Listing = files if isinstance(files, Mapping) else dict.fromkeys(files)
    names = set(sizes)
    if file is not None or form == "gguf":
        return _gguf(where, sizes, file)
    whole = layout.forms(names)
    note = layout.form_note(where, whole) if form is None else None
    if form is None:
        with_config = [each for each, config in CONFIGS.items() if config in names and not weights]
        form = next(iter(whole or with_config), None)
        if form is None:
            raise layout.no_weights(where, names) if layout.CONFIG in names else layout.no_config(where, names)
    elif form not in whole:
        raise WeightsNotFound(where, f"model in {layout.FORM_NAMES[form]} form", _other_forms(whole))
    if form == "gguf":
        return _gguf(where, sizes, None)
    note = layout.joined(note, layout.index_note(where, names, form))
    chosen = layout.hf_weights(names) if form == "hf" else layout.native_weights(names)
    side = tuple(name for name in (*SIDE_FILES, CONFIGS[form]) if name in names)
    return Selection(form, side, tuple(chosen), note=note)


def _other_forms(whole: Sequence[Form]) -> str | None:
    return f"It can be had as {' or '.join(whole)}: --weights-format {whole[0]}." if whole else None


def _gguf(where: str, sizes: Listing, file: str | None) -> Selection:
    """The GGUF `file`, or that of the quantisation `file`, or the only one, with all its parts and its picture part."""
    models = layout.text_ggufs(sizes)
    if file is not None and not file.endswith(layout.GGUF):
        file = _of_quantization(where, models, file)
    if file is None and len(models) != 1:
        if not models:
            raise WeightsNotFound(where, "GGUF model", _other_forms(layout.forms(set(sizes))))
        advice = f"Name one of its files: {where}:{models[0]}"
        raise WeightsNotFound(where, f"single GGUF model (there are {listed(models)})", advice)
    entry = layout.first_shard(file or models[0])
    if entry not in sizes:
        there = f"It has {listed(models)}." if models else "It has no GGUF files."
        raise ModelNotFound(where, f"the repository has no file {file}", there)
    pictures, note = _picture_part(where, sizes, entry)
    weights = [*layout.shard_names(entry), *([pictures] if pictures else [])]
    return Selection("gguf", (), tuple(weights), entry, note)


def _of_quantization(where: str, models: Sequence[str], tag: str) -> str:
    """Of GGUF files the one whose name has `tag`, such as Q8_0, as a word: as llama.cpp and Ollama name them."""
    word = re.compile(rf"(?<![a-z0-9]){re.escape(tag)}(?![a-z0-9]|_[a-z0-9])", re.IGNORECASE)
    found = [name for name in models if word.search(name)]
    if len(found) == 1:
        return found[0]
    if not models:
        raise ModelNotFound(where, f"the repository has no GGUF files, so none of {tag}", f"Leave :{tag} out.")
    why = f"{listed(found)} are all of {tag}" if found else f"none of its GGUF files is of {tag}"
    example = where.removesuffix(tag) + (found or models)[0]
    advice = f"It has {listed(models, GGUFS_SHOWN)}: name one of them, as in {example}."
    raise ModelNotFound(where, why, advice)


def _picture_part(where: str, sizes: Listing, entry: str) -> tuple[str | None, str | None]:
    """The picture part for `entry`, beside it, or else in the next folder above that has one, or else anywhere; and
    what to say of a choice."""
    parts = {name: size for name, size in sizes.items() if layout.is_picture_part(name)}
    if not parts or entry in parts:
        return None, None
    for folder in PurePosixPath(entry).parents:
        if there := {name: size for name, size in parts.items() if PurePosixPath(name).parent == folder}:
            parts = there
            break
    best = layout.best_picture_part(parts)
    said = f"Of {len(parts)} picture parts of {where}, {best} is taken: bf16 before f16, f32, and then the largest."
    return best, said if len(parts) > 1 else None
