"""Headers in, the encoding that each tensor gets out. Reads no data; what is loaded, planned and saved follows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from pixtral_cli.encodings import ENCODINGS, Encoding
from weights_cache.reader import TensorInfo

FLOATS = ("float64", "float32", "float16", "bfloat16")
VISION = ("vision_tower.", "multi_modal_projector.")


@dataclass(frozen=True)
class Placement:
    """`encodings` names the codec of every tensor; `dtype` is what the model computes in.

    `label` is what to call the whole; `fallbacks` are (encoding, columns, neighbour) that rows forced, once each.
    `double_quantization` is of the matrices that are put into nf4.
    """

    label: str
    dtype: str
    encodings: Mapping[str, str]
    fallbacks: tuple[tuple[str, int, str], ...] = ()
    double_quantization: bool = False

    @property
    def notes(self) -> list[str]:
        """A sentence for every fallback."""
        return [
            f"rows of {columns} weights do not divide into {name} blocks of {ENCODINGS[name].block}: "
            f"those layers are {neighbour} instead."
            for name, columns, neighbour in self.fallbacks
        ]


def place(tensors: Mapping[str, TensorInfo], wanted: Encoding | None, quantize_vision: bool = False) -> Placement:
    """Choose each tensor's encoding.

    Without a wish, packed tensors stay as they are in the file, its mixture of types kept, and floats become
    bfloat16, or float32 where the file has nothing narrower. With a wish for a packed encoding the matrices of the
    text model take it (a file that has it already keeps its mixture); the vision part only with `quantize_vision`.
    """
    stored = _label(tensors)
    if wanted is None or (wanted.packed and wanted.name == stored and not quantize_vision):
        dtype = "float32" if stored == "float32" else "bfloat16"
        kept = {n: t.encoding if _stays_packed(t) else dtype for n, t in tensors.items()}
        return Placement(stored, dtype, kept)
    if not wanted.packed:
        return Placement(wanted.name, wanted.name, dict.fromkeys(tensors, wanted.name))
    chosen = {name: _packed(tensor, wanted, quantize_vision) for name, tensor in tensors.items()}
    fallbacks = {
        (wanted.name, tensors[name].shape[-1], encoding)
        for name, encoding in chosen.items()
        if encoding != wanted.name and packable(tensors[name], quantize_vision) and not _looked_up(name, wanted)
    }
    return Placement(wanted.name, "bfloat16", chosen, tuple(sorted(fallbacks)), wanted.double_quantization)


def packable(tensor: TensorInfo, quantize_vision: bool) -> bool:
    """Whether it is a matrix of a linear layer or the embedding, of a part that may be packed."""
    return len(tensor.shape) == 2 and (quantize_vision or not tensor.name.startswith(VISION))


def _packed(tensor: TensorInfo, wanted: Encoding, quantize_vision: bool) -> str:
    if not packable(tensor, quantize_vision):
        return "bfloat16"
    if _looked_up(tensor.name, wanted):
        return "bfloat16"
    return wanted.for_width(tensor.shape[-1]).name


def _looked_up(name: str, wanted: Encoding) -> bool:
    """Whether it is the embedding, which bitsandbytes has no packed form of."""
    return wanted.name == "nf4" and "embed_tokens" in name


def _stays_packed(tensor: TensorInfo) -> bool:
    return tensor.encoding not in FLOATS and len(tensor.shape) == 2


def _label(tensors: Mapping[str, TensorInfo]) -> str:
    """The encoding that most weights of the text model's layers have; float16 is run as bfloat16."""
    weights: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.name.startswith("language_model.layers.") and len(tensor.shape) == 2:
            weights[tensor.encoding] += prod(tensor.shape)
    label = weights.most_common(1)[0][0] if weights else "bfloat16"
    return {"float16": "bfloat16", "float64": "float32"}.get(label, label)
