"""A repository's file names and a wish in, the files that are one whole model in one form out. Reads no file.

The same rules choose what to download and tell whether it is here, so that the two cannot disagree.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import layout
from .errors import ModelNotFound, WeightsNotFound, listed
from .layout import Form

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

CONFIGS: dict[Form, str] = {"hf": layout.CONFIG, "native": layout.NATIVE_CONFIG}
PICTURE_TYPES = ("f16", "bf16", "f32", "q8_0")
"""Which picture part to take of several, by words in their names: the first is what most are made as."""


@dataclass(frozen=True, slots=True)
class Selection:
    """`side` are the small files, the config last; `weights` are files, or one index that names them.

    `entry` is the GGUF file that is the model; in other forms the model is the folder.
    """

    form: Form
    side: tuple[str, ...]
    weights: tuple[str, ...]
    entry: str | None = None

    @property
    def index(self) -> str | None:
        """The index that names the weights, if that is how they are given."""
        return next((name for name in self.weights if name in (layout.INDEX, layout.NATIVE_INDEX)), None)

    def path(self, folder: Path) -> Path:
        """What to open of the folder that holds the files."""
        return folder / self.entry if self.entry else folder


def select(
    where: str, names: Iterable[str], *, form: Form | None = None, file: str | None = None, weights: bool = True
) -> Selection:
    """What of the files `names` is needed: in `form`, or the GGUF `file`, or the preferred form there is.

    Without `weights` a config is enough. Raises WeightsNotFound, PickleRefused or ModelNotFound, all with a way out.
    """
    names = set(names)
    if file is not None or form == "gguf":
        return _gguf(where, names, file)
    whole = layout.forms(names)
    if form is None:
        with_config = [each for each, config in CONFIGS.items() if config in names and not weights]
        form = next(iter(whole or with_config), None)
        if form is None:
            raise layout.no_weights(where, names) if layout.CONFIG in names else layout.no_config(where, names)
    elif form not in whole:
        advice = f"It can be had as {' or '.join(whole)}: --weights-format {whole[0]}." if whole else None
        raise WeightsNotFound(where, f"model in {layout.FORM_NAMES[form]} form", advice)
    if form == "gguf":
        return _gguf(where, names, None)
    chosen = layout.hf_weights(names) if form == "hf" else layout.native_weights(names)
    side = tuple(name for name in (*SIDE_FILES, CONFIGS[form]) if name in names)
    return Selection(form, side, tuple(chosen))


def _gguf(where: str, names: set[str], file: str | None) -> Selection:
    """The GGUF `file`, or the only one, with all its parts and the picture part that lies beside it."""
    models = layout.text_ggufs(names)
    if file is None and len(models) != 1:
        if not models:
            raise WeightsNotFound(where, "GGUF model")
        advice = f"Name one of its files: {where}:{models[0]}"
        raise WeightsNotFound(where, f"single GGUF model (there are {listed(models)})", advice)
    entry = layout.first_shard(file or models[0])
    if entry not in names:
        there = f"It has {listed(models)}." if models else "It has no GGUF files."
        raise ModelNotFound(f"{where}:{file}", f"the repository has no file {file}", there)
    parts = layout.shard_names(entry)
    return Selection("gguf", (), (*parts, *_picture_part(names, entry)), entry)


def _picture_part(names: set[str], entry: str) -> list[str]:
    """The picture part in the folder of `entry`, if there is one (or `entry` is one itself, nothing)."""
    beside = [
        name
        for name in sorted(names)
        if PurePosixPath(name).parent == PurePosixPath(entry).parent and layout.is_picture_part(name)
    ]
    if not beside or entry in beside:
        return []
    return [min(beside, key=_picture_rank)]


def _picture_rank(name: str) -> int:
    words = PurePosixPath(name).name.lower().replace(".", "-").replace("bf16", "B16").split("-")
    ranks = [rank for rank, kind in enumerate(PICTURE_TYPES) if kind.replace("bf16", "B16") in words]
    return min(ranks, default=len(PICTURE_TYPES))
