"""File names, or a folder, in; the files that are one whole model in one form out. Knows files by their names.

The rules speak of names, so that they hold for a folder and for the listing of a repository alike: what chooses what
to download, and what tells whether it is here, cannot disagree. What is read is the index of shards, the config of an
adapter, and of a file that someone named its first bytes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from . import file_kind
from .errors import (
    AdapterOnly,
    CheckpointCorrupt,
    ModelNotFound,
    PickleRefused,
    Unreadable,
    WeightsError,
    WeightsNotFound,
    listed,
)
from .json_fields import read_json_object

Form = Literal["hf", "native", "gguf"]
FORMS: tuple[Form, ...] = get_args(Form)
FORM_NAMES: Mapping[Form, str] = {"hf": "Hugging Face's", "native": "Mistral's own", "gguf": "GGUF"}

CONFIG = "config.json"
NATIVE_CONFIG = "params.json"
CONFIGS: dict[Form, str] = {"hf": CONFIG, "native": NATIVE_CONFIG}
SAFETENSORS = ".safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NATIVE = "consolidated"
"""Files whose name begins so are Mistral's own form."""

NATIVE_SINGLE = "consolidated.safetensors"
NATIVE_INDEX = "consolidated.safetensors.index.json"
GGUF = ".gguf"
PICTURE_PART = "mmproj"
"""In the name of a GGUF file that holds a model's vision tower and projector."""

PICTURE_TYPES = ("bf16", "f16", "f32")
PICKLES = tuple(suffix for suffix, kind in file_kind.SUFFIXES.items() if kind == "pickle")
ADAPTER = "adapter_config.json"
TOKENIZERS = ("tokenizer.json", "tekken.json")
SENTENCEPIECE = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model")
"""How names begin of files that SentencePiece wrote; Mistral's go on with a version."""

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
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.safetensors|\.gguf)")

Listing = Mapping[str, int | None]
"""A repository's file names -> sizes in bytes, None where nobody said."""

Expected = Mapping[Path, frozenset[str]]
"""Weights files -> the tensors that an index promises in each (none where there is no index)."""


def hf_weights(names: Iterable[str]) -> list[str]:
    """Which of a folder's file names stand for its weights in Hugging Face form: the single file, else the index
    of the shards, else all other safetensors files; Mistral's own and adapters never. Empty if there are none."""
    names = set(names)
    for whole in (SINGLE, INDEX):
        if whole in names:
            return [whole]
    return sorted(n for n in names if n.endswith(SAFETENSORS) and not n.startswith((NATIVE, "adapter_")))


def native_weights(names: Iterable[str]) -> list[str]:
    """As hf_weights, in Mistral's own form."""
    names = set(names)
    for whole in (NATIVE_SINGLE, NATIVE_INDEX):
        if whole in names:
            return [whole]
    return sorted(n for n in names if n.startswith(f"{NATIVE}-") and n.endswith(SAFETENSORS))


def text_ggufs(names: Iterable[str]) -> list[str]:
    """The GGUF files among `names` that are models rather than the picture parts of some; of a model in several
    files, the first."""
    return sorted({first_shard(n) for n in names if n.endswith(GGUF) and not is_picture_part(n)})


def gguf_models(folder: Path) -> list[Path]:
    """The files of `text_ggufs` in `folder`."""
    return [folder / name for name in text_ggufs(file_names(folder))]


def is_picture_part(name: str) -> bool:
    """Whether `name`, which may be a path in a repository, is that of a model's picture part."""
    return name.endswith(GGUF) and PICTURE_PART in name.rpartition("/")[2].lower()


def picture_parts(folder: Path, *, deep: bool = False) -> list[Path]:
    """The GGUF files in `folder` that are by their names the picture parts of models; `deep`: in its folders too."""
    paths = folder.rglob(f"*{GGUF}") if deep else folder.glob(f"*{GGUF}")
    return sorted(path for path in paths if is_picture_part(path.name) and path.is_file())


def best_picture_part(sizes: Mapping[str, int | None]) -> str:
    """Of several picture parts, names -> bytes: bf16 by its name, then f16, then f32, then the largest."""

    def rank(name: str) -> tuple[int, int, str]:
        words = re.split(r"[^a-z0-9]+", name.rpartition("/")[2].lower())
        kinds = [number for number, kind in enumerate(PICTURE_TYPES) if kind in words]
        return min(kinds, default=len(PICTURE_TYPES)), -(sizes[name] or 0), name

    return min(sizes, key=rank)


def forms(names: Iterable[str]) -> list[Form]:
    """The forms in which a folder of the files `names` holds a whole model, the preferred first."""
    names = set(names)
    whole = {
        "hf": CONFIG in names and hf_weights(names),
        "native": NATIVE_CONFIG in names and native_weights(names),
        "gguf": text_ggufs(names),
    }
    return [form for form in FORMS if whole[form]]


def weight_files(folder: Path, form: Form | None = "hf") -> Expected:
    """The weights files of `folder` in that form (None: the one that is there), all present.

    Raises WeightsNotFound, PickleRefused, or CheckpointCorrupt with the names of missing shards.
    """
    names = file_names(folder)
    found: dict[str, list[str]] = {"hf": hf_weights(names), "native": native_weights(names), "gguf": text_ggufs(names)}
    if form is None:
        form = next((each for each in FORMS if found[each]), "hf")
    chosen = found[form]
    if not chosen:
        raise no_weights(folder, names)
    if chosen in ([INDEX], [NATIVE_INDEX]):
        return _indexed(folder, chosen[0])
    _require(folder, [shard for name in chosen for shard in shard_names(name)])
    return {folder / name: frozenset() for name in chosen}


def form_note(where: Path | str, whole: Sequence[Form]) -> str | None:
    """What to say where the model is there in the forms `whole`, and nobody chose one: the first is read."""
    if len(whole) < 2:
        return None
    several = " and ".join(FORM_NAMES[form] for form in whole)
    return f"{where} holds the model in {several} form; {whole[0]} is read, and --weights-format chooses another."


def index_note(where: Path | str, names: Iterable[str], form: Form) -> str | None:
    """What to say where a whole file lies beside an index of shards: as in transformers, the file is read."""
    for of, whole, index in (("hf", SINGLE, INDEX), ("native", NATIVE_SINGLE, NATIVE_INDEX)):
        if form == of and {whole, index} <= set(names):
            return f"{where} holds {whole} beside {index}: {whole} is read, and no shard."
    return None


def joined(*notes: str | None) -> str | None:
    """The notes that there are as one, or None."""
    return " ".join(note for note in notes if note) or None


def has_only_sentencepiece(names: Iterable[str]) -> bool:
    """Whether the tokenizer among the files `names` is in SentencePiece's form only, which is not read here."""
    names = set(names)
    return not names & set(TOKENIZERS) and any(name.startswith(SENTENCEPIECE) for name in names)


def no_tokenizer(where: Path | str, names: Iterable[str]) -> WeightsError:
    """The error that says best why the files `names` give no tokenizer."""
    wanted = " or ".join(TOKENIZERS)
    if found := next((name for name in sorted(names) if name.startswith(SENTENCEPIECE)), None):
        advice = (
            "Take a repository that has one, or make a tokenizer.json with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
        return WeightsNotFound(where, f"{wanted}, only SentencePiece's {found}, which is not read here", advice)
    return WeightsNotFound(where, f"tokenizer (looked for {wanted})")


def chosen_files(paths: Sequence[Path]) -> Expected:
    """As weight_files, for paths that someone named: safetensors and GGUF files, and folders of them."""
    check_present(paths)
    found: dict[Path, frozenset[str]] = {}
    for path in paths:
        if path.is_dir():
            found |= weight_files(path, None)
        else:
            found[_readable(path)] = frozenset()
    return found


def check_present(paths: Iterable[Path]) -> None:
    """Raise WeightsNotFound for the first path that is neither a file nor a folder."""
    for path in paths:
        if not (path.is_file() or path.is_dir()):
            raise WeightsNotFound(f"{path} does not exist, so it", "weights", "Check the path of the weights.")


def shards(index: Path) -> dict[str, set[str]]:
    """The shards' file names that `index` gives -> the tensors that it puts into each."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointCorrupt(index, "it has no weight_map")
    found: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise CheckpointCorrupt(index, f"it puts {tensor[:200]!r} into {str(file)[:200]!r}, not a shard's name")
        found.setdefault(file, set()).add(tensor)
    return found


def file_names(folder: Path, *, deep: bool = False) -> list[str]:
    """The names of the files in `folder`, sorted; `deep`: those in its folders too, as paths. Raises Unreadable.

    A link whose content is gone is no file.
    """
    try:
        paths = folder.rglob("*") if deep else folder.iterdir()
        return sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())
    except OSError as error:
        raise Unreadable(folder, error.strerror or str(error)) from error


def no_weights(where: Path | str, names: Iterable[str]) -> WeightsError:
    """The error that says best why the files `names` give no weights."""
    names = sorted(names)
    if error := _telling(where, names):
        return error
    if NATIVE_CONFIG in names and CONFIG not in names:
        return WeightsNotFound(where, f"weights in Mistral's own form (looked for {NATIVE_SINGLE})")
    return WeightsNotFound(where, f"weights (looked for {SINGLE}, {INDEX} and other *{SAFETENSORS})")


def no_config(where: Path | str, names: Iterable[str]) -> WeightsError:
    """The error that says best why a folder of the files `names` is no model in any form."""
    names = sorted(names)
    if NATIVE_CONFIG in names and not native_weights(names):
        return no_weights(where, names)
    advice = f"Give a folder that holds {CONFIG} and *{SAFETENSORS}."
    return _telling(where, names) or WeightsNotFound(where, CONFIG, advice)


def _telling(where: Path | str, names: Sequence[str]) -> WeightsError | None:
    """What is there instead of a whole model, if that tells more than what is missing."""
    if ADAPTER in names:
        return adapter(where, read_json_object(where / ADAPTER) if isinstance(where, Path) else {})
    if any(n.startswith(NATIVE) and n.endswith(SAFETENSORS) for n in names) and NATIVE_CONFIG not in names:
        advice = f"Its weights are in Mistral's own form, which takes its sizes from {NATIVE_CONFIG}: put it there."
        return WeightsNotFound(where, NATIVE_CONFIG, advice)
    for name in names:
        if is_picture_part(name):
            return WeightsNotFound(where, f"text model beside {name}, which is the picture part of one")
    return next((PickleRefused(f"{where}/{name}") for name in names if name.endswith(PICKLES)), None)


def adapter(where: Path | str, config: Mapping[str, Any]) -> AdapterOnly:
    """The error for an adapter that its adapter_config.json describes (peft's `PeftConfig`)."""
    kind, base = (config.get(key) for key in ("peft_type", "base_model_name_or_path"))
    return AdapterOnly(where, *(found if isinstance(found, str) and found else None for found in (kind, base)))


def _readable(path: Path) -> Path:
    """`path`, if it is a safetensors or GGUF file; of one in several files, the first."""
    kind = file_kind.of(path)
    if kind == "pickle":
        raise PickleRefused(path)
    if kind is None:
        advice = f"Give a *{SAFETENSORS} or *{GGUF} file, or their folder."
        raise WeightsNotFound(path, "header of a safetensors or GGUF file", advice)
    return path.with_name(first_shard(path.name)) if kind == "gguf" else path


def _indexed(folder: Path, index: str) -> Expected:
    promised = shards(folder / index)
    _require(folder, promised)
    return {folder / name: frozenset(tensors) for name, tensors in sorted(promised.items())}


def shard_names(name: str) -> list[str]:
    """The numbered shards that `name` is one of; a file that is none of so many stands alone."""
    match = SHARD.fullmatch(name)
    total = int(match["total"]) if match else 0
    if not match or not 1 <= int(match["number"]) <= total:
        return [name]
    return [f"{match['stem']}-{number:05d}-of-{total:05d}{match['suffix']}" for number in range(1, total + 1)]


def first_shard(name: str) -> str:
    """The first of the numbered files that `name` is one of, or `name` itself."""
    return shard_names(name)[0]


def gguf_shards(path: Path) -> list[Path]:
    """The files of the GGUF that begins at `path`, all present. Raises CheckpointCorrupt with those that are not."""
    names = shard_names(path.name)
    if len(names) > 1:
        _require(path.parent, names)
    return [path.parent / name for name in names]


def _require(folder: Path, names: Iterable[str]) -> None:
    present = set(file_names(folder))
    if missing := sorted(set(names) - present):
        raise CheckpointCorrupt(
            folder, f"{'a file is' if len(missing) == 1 else 'files are'} missing: {listed(missing)}"
        )


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
        return next((name for name in self.weights if name in (INDEX, NATIVE_INDEX)), None)

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
    whole = forms(names)
    note = form_note(where, whole) if form is None else None
    if form is None:
        with_config = [each for each, config in CONFIGS.items() if config in names and not weights]
        form = next(iter(whole or with_config), None)
        if form is None:
            raise no_weights(where, names) if CONFIG in names else no_config(where, names)
    elif form not in whole:
        raise WeightsNotFound(where, f"model in {FORM_NAMES[form]} form", _other_forms(whole))
    if form == "gguf":
        return _gguf(where, sizes, None)
    note = joined(note, index_note(where, names, form))
    chosen = hf_weights(names) if form == "hf" else native_weights(names)
    side = tuple(name for name in (*SIDE_FILES, CONFIGS[form]) if name in names)
    return Selection(form, side, tuple(chosen), note=note)


def _other_forms(whole: Sequence[Form]) -> str | None:
    return f"It can be had as {' or '.join(whole)}: --weights-format {whole[0]}." if whole else None


def _gguf(where: str, sizes: Listing, file: str | None) -> Selection:
    """The GGUF `file`, or that of the quantisation `file`, or the only one, with all its parts and its picture part."""
    models = text_ggufs(sizes)
    if file is not None and not file.endswith(GGUF):
        file = _of_quantization(where, models, file)
    if file is None and len(models) != 1:
        if not models:
            raise WeightsNotFound(where, "GGUF model", _other_forms(forms(set(sizes))))
        advice = f"Name one of its files: {where}:{models[0]}"
        raise WeightsNotFound(where, f"single GGUF model (there are {listed(models)})", advice)
    entry = first_shard(file or models[0])
    if entry not in sizes:
        there = f"It has {listed(models)}." if models else "It has no GGUF files."
        raise ModelNotFound(where, f"the repository has no file {file}", there)
    pictures, note = _picture_part(where, sizes, entry)
    weights = [*shard_names(entry), *([pictures] if pictures else [])]
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
    parts = {name: size for name, size in sizes.items() if is_picture_part(name)}
    if not parts or entry in parts:
        return None, None
    for folder in PurePosixPath(entry).parents:
        if there := {name: size for name, size in parts.items() if PurePosixPath(name).parent == folder}:
            parts = there
            break
    best = best_picture_part(parts)
    said = f"Of {len(parts)} picture parts of {where}, {best} is taken: bf16 before f16, f32, and then the largest."
    return best, said if len(parts) > 1 else None
