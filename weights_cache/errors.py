"""What can go wrong between a name and its tensors; every error carries its data.

WeightsError
├── ModelNotFound        no such folder, no such repository
├── Offline              not in the cache, and the network is switched off
├── Gated                the repository wants a licence accepted, or a token
├── DownloadFailed       the network or the server gave up
├── DiskFull             the files would not fit
├── WeightsNotFound      a folder without weights that can be read
├── NotYetSupported      a known format that has no reader yet
├── PickleRefused        a file that could run code when opened
├── AdapterOnly          what was trained on top of a model, without the model
├── TokenUnusable        a token for the Hub that no request can carry
├── CheckpointCorrupt    a file that contradicts itself or is cut short
│   ├── Unreadable       a file or folder that this user may not read, or that is not there
│   ├── LfsPointer       what Git LFS puts in the place of a file that it has not fetched
│   └── FilesMismatch    a file that may be whole, and does not belong to another given with it
├── TensorsMissing       the model needs tensors that the checkpoint lacks
├── TensorsUnexpected    the checkpoint holds tensors that the model has no place for
├── TensorShapeMismatch  a tensor of another shape than the config says
├── UnknownEncoding      no codec has that name
├── WidthNotDivisible    a row that is no whole number of an encoding's blocks
├── NotEncodable         weights that an encoding cannot hold
├── SerializedTooNew     a serialized model that a newer version wrote
├── WriteFailed          a file could not be written
├── ModelUnsupported     a model of a known kind with a feature that is not known here
│   ├── OtherModel           a model of another kind, which does not run here
│   └── QuantizedElsewhere   weights that another program quantised
└── UnknownArchitecture  a config of a model that is not known here
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .wording import get_again, listed, size

OTHER_MODEL = "Its config and its weights may be of different models."
KNOWN_MODELS = "Use a Pixtral or Mistral checkpoint."


class WeightsError(Exception):
    """Base of all errors here: `str()` is one sentence, `hint` the next thing to do (or None).

    `sentence` and `next_step` are templates over the fields of the error; a class whose words depend on more writes
    them itself. Where a class has a field `advice`, that is the hint if it is given.
    """

    sentence = ""
    next_step: str | None = None
    advice: str | None = None

    def __str__(self) -> str:
        return self.sentence.format_map(vars(self))

    @property
    def hint(self) -> str | None:
        return self.advice or (self.next_step and self.next_step.format_map(vars(self)))


@dataclass(eq=False)
class ModelNotFound(WeightsError):
    """`name` is neither here nor on the Hub; `reason` ends the sentence."""

    name: str
    reason: str
    advice: str | None = None
    sentence = "There is no model {name!r}: {reason}."


@dataclass(eq=False)
class Offline(WeightsError):
    """`name` would have to be downloaded into the folder `cache`, and HF_HUB_OFFLINE forbids asking the Hub."""

    name: str
    cache: Path
    forced: bool = False
    next_step = "There is no folder of that name either. Unset HF_HUB_OFFLINE once to download it, or check the path."

    def __str__(self) -> str:
        why = "was asked for anew" if self.forced else f"is not completely in {self.cache}"
        return f"{self.name!r} {why}, and HF_HUB_OFFLINE forbids downloading it."


@dataclass(eq=False)
class Gated(WeightsError):
    """The Hub refuses `name` to this user; `page` is where access is asked for."""

    name: str
    page: str
    status: int | None = None
    sentence = "The Hub gives {name!r} only to people whom its owner has let in."
    next_step = "Ask for access at {page}, then set HF_TOKEN (or run `hf auth login`) and run this again."


@dataclass(eq=False)
class DownloadFailed(WeightsError):
    """The transfer of `name` broke off for `reason`; the files that had arrived whole are kept."""

    name: str
    reason: str
    advice: str | None = None
    next_step = (
        "Run the same command again: files that have arrived are kept. If a folder was meant, check its path: "
        "there is none of that name."
    )

    def __str__(self) -> str:
        return f"Downloading {self.name!r} failed: {self.reason.rstrip('.')}."


@dataclass(eq=False)
class DiskFull(WeightsError):
    """`needed` more bytes for `name` do not fit into the `free` bytes that the disk of `folder` has."""

    name: str
    folder: Path
    needed: int
    free: int
    advice: str | None = None
    next_step = "Make room there, or take another disk: HF_HUB_CACHE says where downloads go."

    def __str__(self) -> str:
        room = f"the disk of {self.folder} has {size(self.free)} free"
        return f"{self.name!r} needs {size(self.needed)} more, and {room}."


@dataclass(eq=False)
class WeightsNotFound(WeightsError):
    """`path` lacks what was looked for, which `looked_for` names."""

    path: Path | str
    looked_for: str
    advice: str | None = None
    sentence = "{path} has no {looked_for}."
    next_step = "Check the name. If it is right, files of the model were left out: fetch them again."


@dataclass(eq=False)
class NotYetSupported(WeightsError):
    """`path` is in a format (`what`) that is known but has no reader yet."""

    path: Path | str
    what: str
    sentence = "{path} is {what}, which cannot be read yet."
    next_step = "Use the model's Hugging Face form: a folder with config.json and *.safetensors."


@dataclass(eq=False)
class PickleRefused(WeightsError):
    """`path` is a pickle: opening one can run any code, so it is never opened."""

    path: Path | str
    sentence = "{path} is a pickle, which can run code when opened, so it is never opened."
    next_step = "Use the model's safetensors files."


@dataclass(eq=False)
class AdapterOnly(WeightsError):
    """`path` holds an adapter of the method `kind` to the model `base`, where they are known."""

    path: Path | str
    kind: str | None = None
    base: str | None = None
    next_step = "Merge it into its base with peft (merge_and_unload, then save_pretrained) and give that folder."

    def __str__(self) -> str:
        kind = "a LoRA adapter" if self.kind in (None, "LORA") else f"an adapter ({self.kind})"
        return f"{self.path} is {kind} of {self.base or 'a model that it does not name'}, and no whole model."


@dataclass(eq=False)
class TokenUnusable(WeightsError):
    """The token that stands in `source` has characters that no header of a request may have."""

    source: str
    sentence = "The token in {source} has characters that no token has."
    next_step = "Copy it again from the Hub's page of access tokens: it begins with hf_, and letters and digits follow."


@dataclass(eq=False)
class CheckpointCorrupt(WeightsError):
    """`path` cannot be trusted, for `reason`."""

    path: Path
    reason: str
    sentence = "{path} is damaged: {reason}."

    @property
    def hint(self) -> str | None:
        return super().hint or f"{get_again(self.path)}, or export it again."


@dataclass(eq=False)
class LfsPointer(CheckpointCorrupt):
    """`path` is the few lines that stand for a large file in a git repository."""

    reason: str = "it is a pointer of Git LFS"
    sentence = "{path} is only a pointer of Git LFS: the file itself was not fetched."
    next_step = "Run `git lfs pull` in {path.parent}."


@dataclass(eq=False)
class Unreadable(CheckpointCorrupt):
    """The system does not let `path` be read, for `reason`."""

    sentence = "{path} cannot be read ({reason})."
    next_step = "Check the path, and who may read it."


@dataclass(eq=False)
class FilesMismatch(CheckpointCorrupt):
    """The file `path` does not go together with the file `other`, for `reason`."""

    other: Path
    sentence = "{path} and {other} do not go together: {reason}."
    next_step = "Give files of one model, and each part of it once."


@dataclass(eq=False)
class TensorsMissing(WeightsError):
    """The model has a place for `names`, and the checkpoint `path` has none of them."""

    names: Sequence[str]
    path: Path
    next_step = "Its config and its weights may be of different models, or a shard may be missing."

    def __str__(self) -> str:
        return f"The checkpoint {self.path} lacks {_tensors(self.names)}: {listed(self.names)}."


@dataclass(eq=False)
class TensorsUnexpected(WeightsError):
    """The checkpoint `path` holds `names`, and the model that its config describes has no place for them."""

    names: Sequence[str]
    path: Path
    next_step = OTHER_MODEL

    def __str__(self) -> str:
        found = f"The checkpoint {self.path} has {_tensors(self.names)}"
        return f"{found} that its config has no place for: {listed(self.names)}."


@dataclass(eq=False)
class TensorShapeMismatch(WeightsError):
    """Tensor `name` has shape `found` where the config makes it `expected`."""

    name: str
    expected: tuple[int, ...]
    found: tuple[int, ...]
    next_step = OTHER_MODEL

    def __str__(self) -> str:
        found, expected = list(self.found), list(self.expected)
        return f"Tensor {self.name} has shape {found}, and its config makes it {expected}."


@dataclass(eq=False)
class UnknownEncoding(WeightsError):
    """No codec is called `name`; `known` are the names there are."""

    name: str
    known: Sequence[str]
    sentence = "The encoding {name!r} is not known."

    @property
    def hint(self) -> str:
        return f"Known encodings: {', '.join(self.known)}."


@dataclass(eq=False)
class WidthNotDivisible(WeightsError):
    """A row of `width` (in `unit`) is no whole number of blocks of `block` in the encoding `name`."""

    name: str
    width: int
    block: int
    unit: str = "weights"
    sentence = "A row of {width} {unit} is no whole number of {name} blocks of {block}."
    next_step = "Choose an encoding with smaller blocks, such as q4_0 or bfloat16."


@dataclass(eq=False)
class NotEncodable(WeightsError):
    """Weights cannot be put into the encoding `name`, for `reason`."""

    name: str
    reason: str
    sentence = "These weights cannot be encoded as {name}: {reason}."
    next_step = "Choose another encoding."


@dataclass(eq=False)
class SerializedTooNew(WeightsError):
    """`path` says that it is of format version `found`; `known` is the newest that can be read."""

    path: Path
    found: object
    known: int
    sentence = "{path} is a serialized model of version {found}, and this program reads version {known}."
    next_step = "Upgrade pixtral-cli, or export the model again."


@dataclass(eq=False)
class WriteFailed(WeightsError):
    """`path` could not be written, for `reason`; nothing of it was left behind."""

    path: Path
    reason: str
    sentence = "{path} cannot be written: {reason}."
    next_step = "Choose another place, or make room there."


@dataclass(eq=False)
class UnknownArchitecture(WeightsError):
    """A config names the architecture `found`; `known` are those that can be run."""

    found: str
    known: Sequence[str] = ()
    next_step = KNOWN_MODELS

    def __str__(self) -> str:
        return f"The architecture {self.found!r} is not known; known are {', '.join(self.known)}."


@dataclass(eq=False)
class ModelUnsupported(WeightsError):
    """`path` describes a model with `what`, which is not known here; running it without would give wrong answers."""

    path: Path | str
    what: str
    sentence = "{path} is a model with {what}, which is not known here."
    next_step = KNOWN_MODELS


@dataclass(eq=False)
class OtherModel(ModelUnsupported):
    """`path` is `what`, a model of a kind that does not run here; `advice` says what to take instead."""

    advice: str | None = None
    sentence = "{path} is {what}, which does not run here."


@dataclass(eq=False)
class QuantizedElsewhere(ModelUnsupported):
    """The weights of `path` were quantised with the method `what`; `other` is another form that is there as well."""

    other: str | None = None
    sentence = "{path} was quantised with {what}, which is not known here."

    @property
    def hint(self) -> str:
        if self.other:
            return f"Take the other form of it that is there: --weights-format {self.other}."
        return (
            "Take the model in bfloat16, which --quantization-encoding q4_k packs while it loads, a GGUF of it, "
            "or one in FP8 or bitsandbytes' nf4."
        )


def _tensors(names: Sequence[str]) -> str:
    return "a tensor" if len(names) == 1 else f"{len(names)} tensors"
