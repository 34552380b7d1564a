"""A model's folder or file in; its config, side files and tensors under our names out. Knows no architecture.

Headers are read when tensors are first asked for, so that a folder without weights serves whoever needs only
the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cache, configs, file_kind, layout, names, other_models, quantized_elsewhere, tensors, weight_files
from .errors import PickleRefused, WeightsNotFound
from .formats.gguf import GgufFile
from .formats.reader import TensorInfo
from .formats.serialized import EmbeddedFile, SerializedFile
from .json_fields import parse_json_object, read_json_object
from .layout import Form
from .progress import Progress
from .tensors import Stored
from .wording import listed

if TYPE_CHECKING:
    from torch import Tensor

    from .packed import PackedWeight

GENERATION_CONFIG = "generation_config.json"
WRITTEN_TOKENIZER = "gguf_tokenizer.json"
"""`written_tokenizer` as a file."""
OLDER_ORDER = (
    "{path} has its weights in an older order, and loading copies them into rows: "
    "`pixtral export {path} NEW_FILE` writes a file that is read as it lies."
)


@dataclass(eq=False)
class Checkpoint:
    """An opened model: `folder` (or file), and `config` as Hugging Face writes it, translated from other forms."""

    folder: Path
    config: dict[str, Any]
    weight_paths: Sequence[Path] = ()
    form: Form = "hf"
    """Where config, tokenizer and template come from."""
    note: str | None = None
    """What was chosen among several possibilities: a sentence to show, or None."""
    written_tokenizer: Mapping[str, Any] | None = None
    """The tokenizer as a GGUF's metadata has it (see `configs.gguf_tokenizer`); None in other forms."""

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json as it is, {} if the folder has none."""
        path = self.file(GENERATION_CONFIG)
        return read_json_object(path) if path else {}

    def file(self, name: str) -> Path | None:
        """The path of the side file `name` ("tokenizer.json", …), or None if there is none. Raises LfsPointer."""
        path = self.folder / name
        if not path.is_file():
            return None
        file_kind.refuse_pointer(path)
        return path

    def side_files(self) -> dict[str, bytes]:
        """All that is needed beside the weights, by file name: config.json as it is in `config`, what there is of
        tokenizer, template and settings of images, and a written tokenizer as WRITTEN_TOKENIZER."""
        paths = {name: self.file(name) for name in layout.SIDE_FILES}
        found = {name: path.read_bytes() for name, path in paths.items() if path}
        if self.written_tokenizer is not None:
            found[WRITTEN_TOKENIZER] = json.dumps(self.written_tokenizer).encode()
        return found | {layout.CONFIG: json.dumps(self.config).encode()}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Our names -> TensorInfo, from headers only. Raises a WeightsError for what cannot be trusted."""
        return {ours: replace(stored.info, name=ours) for ours, stored in self._stored.items()}

    def weight(self, name: str) -> Tensor | PackedWeight:
        """The weight that we call `name`, in the file's shape and encoding: memory-mapped, or copied if its rows are
        reordered. KeyError if unknown."""
        return self._stored[name].weight()

    def tensor(self, name: str) -> Tensor:
        """As `weight`, in the file's dtype; decoded to float32 if it is packed."""
        from .packed import plain

        return plain(self.weight(name))

    def release(self, name: str) -> None:
        """Give back the memory that reading the tensor has taken, once it has been converted. KeyError if unknown."""
        stored = self._stored[name]
        stored.reader.release(stored.name)

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        given = self.weight_paths
        chosen = weight_files.chosen(given) if given else weight_files.in_folder(self.folder, self.form)
        for folder in filter(Path.is_dir, given):
            _refuse_quantized(folder)
        found = tensors.stored(chosen)
        if names.EMBEDDING not in found and names.HEAD in found and configs.ties_embeddings(self.config):
            found[names.EMBEDDING] = found.pop(names.HEAD)  # of two tied tensors a file may have kept either
        return found


class SerializedCheckpoint(Checkpoint):
    """An opened serialized model. `encoding` is what it was saved in.

    A file that was neither written nor checked on this machine, or that has changed since, is read and checked
    against its hashes once, with steps to `progress`; for whoever reads no `weights`, its side files are.
    Raises CheckpointCorrupt and SerializedTooNew.
    """

    def __init__(self, path: Path, *, weights: bool = True, progress: Progress | None = None) -> None:
        self._file = SerializedFile(path)
        if not self._file.known:
            self._file.check(weights=weights, progress=progress)
        manifest = self._file.manifest
        note = OLDER_ORDER.format(path=path) if self._file.in_older_order else None
        super().__init__(path, self._json(layout.CONFIG) or {}, form=manifest.form, note=note)
        self.written_tokenizer = self._json(WRITTEN_TOKENIZER)
        self.encoding = manifest.encoding
        self.model_name = manifest.model

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return self._json(GENERATION_CONFIG) or {}

    def file(self, name: str) -> Path | None:
        data = self._file.read(name)
        return None if data is None else EmbeddedFile(self.folder, name, data)  # type: ignore[return-value]

    def side_files(self) -> dict[str, bytes]:
        return {name: self._file.read(name) or b"" for name in self._file.file_names}

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        return {name: Stored(self._file, name) for name in self._file.tensors}

    def _json(self, name: str) -> dict[str, Any] | None:
        data = self._file.read(name)
        return None if data is None else parse_json_object(self._file.path, data, f"its {name}")


def open(
    path: Path | None, weight_paths: Sequence[Path] = (), form: Form | None = None, *, weights: bool = True
) -> Checkpoint:
    """The checkpoint at `path`: a folder, or a GGUF file; None for the GGUF file among `weight_paths`.

    Files or folders in `weight_paths` replace a folder's own weights; its config and tokenizer stay. Beside a GGUF
    file they add what it lacks, its vision part (an mmproj file), which is also looked for beside the file itself.
    `form` chooses where a folder holds several; by default the first of "hf", "native", "gguf", and `note` says so.
    Without `weights`, nobody will ask for the folder's own, which may then be of a kind that is not read here.

    Raises WeightsNotFound (nothing there, no config), PickleRefused (only pickles), CheckpointCorrupt (a config or
    GGUF that cannot be trusted), OtherModel, UnknownArchitecture and ModelUnsupported (of GGUF and native),
    QuantizedElsewhere, AdapterOnly, NotYetSupported. A folder's weights are looked at when asked for.
    """
    weight_paths = [Path(each) for each in weight_paths]
    if path is None:
        return _open_ggufs(weight_paths, weight_paths[0].parent if weight_paths else Path.cwd())
    path = Path(path)
    if path.is_file():
        _require_gguf(path)
        return _open_ggufs([path, *weight_paths], path)
    if not path.is_dir():
        raise WeightsNotFound(f"{path} does not exist, so it", "model", f"Give the folder that holds {layout.CONFIG}.")
    chosen, note = layout.choose_form(path, weight_files.file_names(path), form, own_weights=not weight_paths)
    if chosen == "gguf":
        return _open_ggufs([*weight_files.in_folder(path, "gguf"), *weight_paths], path, note)
    return _open_folder(path, weight_paths, chosen, note, weights=weights and not weight_paths)


def _open_folder(folder: Path, weight_paths: list[Path], form: Form, note: str | None, *, weights: bool) -> Checkpoint:
    """The model in a folder with a config, whose own weights are wanted or not."""
    present = weight_files.file_names(folder)
    if layout.has_only_sentencepiece(present):
        raise layout.no_tokenizer(folder, present)
    for name in set(present).intersection(layout.TOKENIZERS):
        file_kind.refuse_pointer(folder / name)
    described = check_config(folder, folder, form, present, weights=weights)
    if weights:
        note = layout.joined(note, layout.index_note(folder, present, form))
    config = configs.from_native(folder / layout.NATIVE_CONFIG, described) if form == "native" else described
    return Checkpoint(folder, config, _with_vision(weight_paths, config), form=form, note=note)


def check_config(
    where: Path | str,
    folder: Path,
    form: Form,
    names: Collection[str],
    *,
    weights: bool,
    accepts: Callable[[Mapping[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """What the config in `folder` says, as it is written; `names` are the files that are, or will be, beside it.

    Raises OtherModel, or what `accepts` raises of the config as Hugging Face writes it, and if `weights` are wanted
    QuantizedElsewhere: where the model itself does not run, it is no use to say that its weights cannot be read.
    """
    path = folder / layout.FOLDER_FORMS[form].config
    described = read_json_object(path)
    if form == "native":
        other_models.refuse_native(where, described)
    else:
        other_models.refuse(where, described)
        if accepts:
            accepts(described)
    if weights:
        quantized_elsewhere.refuse(where, described, names, form)
    if form == "native" and accepts:
        accepts(configs.from_native(path, described))
    return described


def _refuse_quantized(folder: Path) -> None:
    """Raise QuantizedElsewhere if a config beside the weights in `folder`, which another model borrows, says so."""
    present = weight_files.file_names(folder)
    if "hf" in layout.forms(present):
        quantized_elsewhere.refuse(folder, read_json_object(folder / layout.CONFIG), present)


def _require_gguf(path: Path) -> None:
    """Raise what says best why a file that someone gave as a model is none."""
    kind = file_kind.of(path)
    if kind == "pickle":
        raise PickleRefused(path)
    if kind != "gguf":
        advice = (
            "Give the model's folder, or a GGUF file; what `pixtral export` wrote goes to --serialized-model-path, "
            "and weights for a folder's config go to --weight-path."
        )
        raise WeightsNotFound(path, "config of its own", advice)


def _open_ggufs(paths: Sequence[Path], where: Path, note: str | None = None) -> Checkpoint:
    """The one model of text among `paths`, with the mmproj file among them or beside it. Headers say which is which;
    `where` is what errors name."""
    given = list(dict.fromkeys(path.with_name(layout.first_shard(path.name)) for path in paths))
    files = [GgufFile(path) for path in given if file_kind.of(path) == "gguf" and not path.is_dir()]
    texts = [file for file in files if not configs.is_vision_gguf(file)]
    vision = next((file for file in files if configs.is_vision_gguf(file)), None)
    if len(texts) != 1:
        raise _no_single_model(where, [file.path.name for file in texts], vision)
    text = texts[0]
    if vision is None:
        vision, said = _vision_beside(text)
        given += [vision.path] if vision else []
        note = layout.joined(note, said)
    config = configs.from_gguf(text, vision)
    return Checkpoint(text.path, config, given, form="gguf", note=note, written_tokenizer=configs.gguf_tokenizer(text))


def _no_single_model(where: Path, models: Sequence[str], vision: GgufFile | None) -> WeightsNotFound:
    if models:
        looked_for = f"single GGUF model (there are {listed(models)})"
        return WeightsNotFound(where, looked_for, "Give the path of the .gguf file itself.")
    if vision:
        looked_for = "text model: it is the picture part of one"
        return WeightsNotFound(vision.path, looked_for, "Give the model's own .gguf as well.")
    return WeightsNotFound(where, "GGUF model", "Give the model's folder or its .gguf file.")


def _vision_beside(text: GgufFile) -> tuple[GgufFile | None, str | None]:
    """The mmproj file in the folder of `text`, or else in its repository, the best of those that fit; and what to
    say."""
    paths = weight_files.mmproj_files(text.path.parent)
    if not paths and (snapshot := cache.snapshot_of(text.path)):
        paths = weight_files.mmproj_files(snapshot, deep=True)
    found = {str(path): GgufFile(path) for path in paths}
    fitting = {name: file for name, file in found.items() if configs.belong_together(text, file)}
    if not fitting:
        return None, f"No picture part beside {text.path.name} fits it." if found else None
    best = fitting[layout.best_mmproj({name: file.path.stat().st_size for name, file in fitting.items()})]
    said = f"Of {len(fitting)} picture parts beside {text.path.name}, {best.path.name} is read."
    return best, said if len(fitting) > 1 else None


def _with_vision(weight_paths: Sequence[Path], config: Mapping[str, Any]) -> list[Path]:
    """`weight_paths`, and what lies beside a GGUF among them and sees, if the model does."""
    paths = list(weight_paths)
    ggufs = [GgufFile(path) for path in paths if file_kind.of(path) == "gguf" and path.is_file()]
    if not ggufs or "vision_config" not in config or any(map(configs.is_vision_gguf, ggufs)):
        return paths
    vision, _ = _vision_beside(ggufs[0])
    return [*paths, vision.path] if vision else paths
