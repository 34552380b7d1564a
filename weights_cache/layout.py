"""Of the names of files, those that make one whole model in one form; or the error that says best why there is none.

The rules speak of names, so that they hold for a folder and for the listing of a repository alike: what chooses what
to download, and what tells whether it is here, cannot disagree. No file is read but the config of an adapter.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from . import file_kind
from .errors import AdapterOnly, ModelNotFound, PickleRefused, WeightsError, WeightsNotFound
from .json_fields import read_json_object
from .wording import listed

Form = Literal["hf", "native", "gguf"]
FORMS: tuple[Form, ...] = get_args(Form)  # the preferred first
FORM_NAMES: Mapping[Form, str] = {"hf": "Hugging Face's", "native": "Mistral's own", "gguf": "GGUF"}

CONFIG = "config.json"
NATIVE_CONFIG = "params.json"
NATIVE = "consolidated"  # how names of weights files in Mistral's own form begin
SAFETENSORS = ".safetensors"
GGUF = ".gguf"
MMPROJ = "mmproj"  # in the name of a GGUF file that holds a model's vision tower and projector
MMPROJ_TYPES = ("bf16", "f16", "f32")
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
    "SYSTEM_PROMPT.txt",
)
"""The small files that are fetched beside a config; the rest of a repository is left alone."""


@dataclass(frozen=True)
class FolderForm:
    """The names of a form's config, and of its weights: one file, or the index of shards, or `others`."""

    config: str
    single: str
    index: str
    others: re.Pattern[str]


FOLDER_FORMS: Mapping[Form, FolderForm] = {
    "hf": FolderForm(
        CONFIG,
        "model.safetensors",
        "model.safetensors.index.json",
        re.compile(r"(?!consolidated|adapter_).*\.safetensors"),
    ),
    "native": FolderForm(
        NATIVE_CONFIG,
        "consolidated.safetensors",
        "consolidated.safetensors.index.json",
        re.compile(r"consolidated-.*\.safetensors"),
    ),
}
INDEXES = tuple(rule.index for rule in FOLDER_FORMS.values())
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.safetensors|\.gguf)")
GGUFS_SHOWN = 20

Listing = Mapping[str, int | None]
"""A repository's file names -> sizes in bytes, None where nobody said."""


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
        return next((name for name in self.weights if name in INDEXES), None)

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
    note = None
    if file is None and form != "gguf":
        form, note = choose_form(where, sizes, form, needs_weights=weights)
    if file is not None or form is None or form == "gguf":
        return _select_gguf(where, sizes, file)
    side = tuple(name for name in (*SIDE_FILES, FOLDER_FORMS[form].config) if name in sizes)
    note = joined(note, index_note(where, sizes, form))
    return Selection(form, side, tuple(weight_names(sizes, form)), note=note)


def choose_form(
    where: Path | str,
    names: Iterable[str],
    wanted: Form | None,
    *,
    needs_weights: bool = False,
    own_weights: bool = True,
) -> tuple[Form, str | None]:
    """The form in which to take the model of the files `names`, and a sentence when another would have been possible.

    Without `needs_weights` a config is enough; without `own_weights`, which come from elsewhere, it decides.
    Raises WeightsNotFound, PickleRefused or AdapterOnly when there is none.
    """
    names = set(names)
    whole = forms(names)
    described = [] if needs_weights else [form for form, rule in FOLDER_FORMS.items() if rule.config in names]
    possible = whole + described if own_weights else described + whole
    if wanted is not None and wanted not in possible:
        raise WeightsNotFound(where, f"model in {FORM_NAMES[wanted]} form", _other_forms(whole))
    if not possible:
        raise no_weights(where, names) if CONFIG in names else no_config(where, names)
    return wanted or possible[0], form_note(where, whole) if wanted is None and own_weights else None


def forms(names: Iterable[str]) -> list[Form]:
    """The forms in which a folder of the files `names` holds a whole model, the preferred first."""
    names = set(names)
    return [
        form for form in FORMS if (form == "gguf" or FOLDER_FORMS[form].config in names) and weight_names(names, form)
    ]


def weight_names(names: Iterable[str], form: Form) -> list[str]:
    """Which of a folder's file names stand for its weights in that form. Empty if there are none.

    The single file, else the index of the shards, else all other safetensors files of that form; adapters never. Of
    GGUF files those that are models rather than mmproj files; of a model in several files, the first.
    """
    names = set(names)
    if form == "gguf":
        return sorted({first_shard(n) for n in names if n.endswith(GGUF) and not is_mmproj(n)})
    rule = FOLDER_FORMS[form]
    for whole in (rule.single, rule.index):
        if whole in names:
            return [whole]
    return sorted(filter(rule.others.fullmatch, names))


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


def is_mmproj(name: str) -> bool:
    """Whether `name`, which may be a path in a repository, is that of an mmproj file."""
    return name.endswith(GGUF) and MMPROJ in name.rpartition("/")[2].lower()


def best_mmproj(sizes: Mapping[str, int | None]) -> str:
    """Of several mmproj files, names -> bytes: bf16 by its name, then f16, then f32, then the largest."""

    def rank(name: str) -> tuple[int, int, str]:
        words = re.split(r"[^a-z0-9]+", name.rpartition("/")[2].lower())
        types = [number for number, kind in enumerate(MMPROJ_TYPES) if kind in words]
        return min(types, default=len(MMPROJ_TYPES)), -(sizes[name] or 0), name

    return min(sizes, key=rank)


def _select_gguf(where: str, sizes: Listing, file: str | None) -> Selection:
    """The GGUF `file`, or that of the quantisation `file`, or the only one, with all its parts and its mmproj file."""
    models = weight_names(sizes, "gguf")
    if file is not None and not file.endswith(GGUF):
        file = _of_quantization(where, models, file)
    if file is None and len(models) != 1:
        if not models:
            raise WeightsNotFound(where, "GGUF model", _other_forms(forms(sizes)))
        advice = f"Name one of its files: {where}:{models[0]}"
        raise WeightsNotFound(where, f"single GGUF model (there are {listed(models)})", advice)
    entry = first_shard(file or models[0])
    if entry not in sizes:
        there = f"It has {listed(models)}." if models else "It has no GGUF files."
        raise ModelNotFound(where, f"the repository has no file {file}", there)
    mmproj, note = _mmproj_of(where, sizes, entry)
    return Selection("gguf", (), (*shard_names(entry), *mmproj), entry, note)


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


def _mmproj_of(where: str, sizes: Listing, entry: str) -> tuple[list[str], str | None]:
    """The mmproj file for `entry`, if there is one: beside it, or else in the next folder above that has one, or else
    anywhere; and what to say of a choice."""
    parts = {name: size for name, size in sizes.items() if is_mmproj(name)}
    if not parts or entry in parts:
        return [], None
    for folder in PurePosixPath(entry).parents:
        if there := {name: size for name, size in parts.items() if PurePosixPath(name).parent == folder}:
            parts = there
            break
    best = best_mmproj(parts)
    said = f"Of {len(parts)} picture parts of {where}, {best} is taken: bf16 before f16, f32, and then the largest."
    return [best], said if len(parts) > 1 else None


def form_note(where: Path | str, whole: Sequence[Form]) -> str | None:
    """What to say where the model is there in the forms `whole`, and nobody chose one: the first is read."""
    if len(whole) < 2:
        return None
    several = " and ".join(FORM_NAMES[form] for form in whole)
    return f"{where} holds the model in {several} form; {whole[0]} is read, and --weights-format chooses another."


def index_note(where: Path | str, names: Iterable[str], form: Form) -> str | None:
    """What to say where a whole file lies beside an index of shards: as in transformers, the file is read."""
    rule = FOLDER_FORMS.get(form)
    if rule is None or not {rule.single, rule.index} <= set(names):
        return None
    return f"{where} holds {rule.single} beside {rule.index}: {rule.single} is read, and no shard."


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
    found = next((name for name in sorted(names) if name.startswith(SENTENCEPIECE)), None)
    if found is None:
        return WeightsNotFound(where, f"tokenizer (looked for {wanted})")
    advice = (
        "Take a repository that has one, or make a tokenizer.json with transformers: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
    )
    return WeightsNotFound(where, f"{wanted}, only SentencePiece's {found}, which is not read here", advice)


def no_weights(where: Path | str, names: Iterable[str]) -> WeightsError:
    """The error that says best why the files `names` give no weights."""
    names = sorted(names)
    if error := _there_instead(where, names):
        return error
    hf, native = FOLDER_FORMS["hf"], FOLDER_FORMS["native"]
    if NATIVE_CONFIG in names and CONFIG not in names:
        return WeightsNotFound(where, f"weights in Mistral's own form (looked for {native.single})")
    return WeightsNotFound(where, f"weights (looked for {hf.single}, {hf.index} and other *{SAFETENSORS})")


def no_config(where: Path | str, names: Iterable[str]) -> WeightsError:
    """The error that says best why a folder of the files `names` is no model in any form."""
    names = sorted(names)
    if NATIVE_CONFIG in names and not weight_names(names, "native"):
        return no_weights(where, names)
    advice = f"Give a folder that holds {CONFIG} and *{SAFETENSORS}."
    return _there_instead(where, names) or WeightsNotFound(where, CONFIG, advice)


def adapter(where: Path | str, config: Mapping[str, Any]) -> AdapterOnly:
    """The error for an adapter that its adapter_config.json describes (peft's `PeftConfig`)."""
    kind, base = (config.get(key) for key in ("peft_type", "base_model_name_or_path"))
    return AdapterOnly(where, *(found if isinstance(found, str) and found else None for found in (kind, base)))


def _there_instead(where: Path | str, names: Sequence[str]) -> WeightsError | None:
    """What is there instead of a whole model, if that tells more than what is missing."""
    if ADAPTER in names:
        return adapter(where, read_json_object(where / ADAPTER) if isinstance(where, Path) else {})
    if any(n.startswith(NATIVE) and n.endswith(SAFETENSORS) for n in names) and NATIVE_CONFIG not in names:
        advice = f"Its weights are in Mistral's own form, which takes its sizes from {NATIVE_CONFIG}: put it there."
        return WeightsNotFound(where, NATIVE_CONFIG, advice)
    for name in names:
        if is_mmproj(name):
            return WeightsNotFound(where, f"text model beside {name}, which is the picture part of one")
    return next((PickleRefused(f"{where}/{name}") for name in names if name.endswith(PICKLES)), None)


def _other_forms(whole: Sequence[Form]) -> str | None:
    return f"It can be had as {' or '.join(whole)}: --weights-format {whole[0]}." if whole else None
