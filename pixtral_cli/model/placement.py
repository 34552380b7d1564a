"""Headers in, the encoding that each tensor gets out. Reads no data; what is loaded, planned and saved follows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from weights_cache.encodings import ENCODINGS, Encoding
from weights_cache.errors import CheckpointCorrupt
from weights_cache.formats.reader import TensorInfo
from weights_cache.names import EMBEDDING, POSITIONS, VISION

FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Placement:
    """`encodings` names the codec of every tensor; `dtype` is what the model computes in.

    `label` is what to call the whole; `fallbacks` are (encoding, columns, neighbour) that rows forced, in order.
    `double_quantization` is of the matrices that are put into nf4.
    """

    label: str
    dtype: str
    encodings: Mapping[str, str]
    fallbacks: tuple[tuple[str, int, str], ...] = ()
    double_quantization: bool = False

    @property
    def notes(self) -> list[str]:
        """A sentence for every encoding that rows do not divide into, and what they are in instead."""
        pairs = dict.fromkeys((name, neighbour) for name, _, neighbour in self.fallbacks)
        return [self._note(name, neighbour) for name, neighbour in pairs]

    def _note(self, name: str, neighbour: str) -> str:
        widths = [str(columns) for wanted, columns, taken in self.fallbacks if (wanted, taken) == (name, neighbour)]
        return (
            f"rows of {' or '.join(widths)} weights do not divide into {name} blocks of {ENCODINGS[name].block}: "
            f"those layers are {neighbour} instead."
        )


def place(tensors: Mapping[str, TensorInfo], wanted: Encoding | None, quantize_vision: bool = False) -> Placement:
    """Choose each tensor's encoding.

    Without a wish, packed tensors stay as they are in the file, its mixture of types kept, and floats become
    bfloat16, or float32 where the file has nothing narrower. With a wish for a packed encoding the matrices of the
    text model take it (a file that has it already keeps its mixture); the vision part only with `quantize_vision`.
    Raises CheckpointCorrupt for a tensor of another type, such as integers.
    """
    for name, tensor in tensors.items():
        if tensor.encoding not in (*FLOATS, *ENCODINGS):
            raise CheckpointCorrupt(tensor.file, f"tensor {name} is of {tensor.dtype}, not of weights")
    if wanted is not None and not wanted.packed:
        return Placement(wanted.name, wanted.name, dict.fromkeys(tensors, wanted.name))
    stored = _label(tensors)
    keeps = wanted is None or wanted.name == stored
    dtype = "float32" if keeps and stored == "float32" else "bfloat16"
    chosen = {name: tensor.encoding if keeps and _stays_packed(tensor) else dtype for name, tensor in tensors.items()}
    if wanted is None:
        return Placement(stored, dtype, chosen)
    taking = [t for t in tensors.values() if _takes(t, wanted, quantize_vision) and not (keeps and _is_kept(t))]
    chosen |= {tensor.name: wanted.for_width(tensor.shape[-1]).name for tensor in taking}
    fallbacks = {(wanted.name, t.shape[-1], chosen[t.name]) for t in taking if chosen[t.name] != wanted.name}
    return Placement(wanted.name, dtype, chosen, tuple(sorted(fallbacks)), wanted.double_quantization)


def _takes(tensor: TensorInfo, wanted: Encoding, quantize_vision: bool) -> bool:
    """Whether it is a matrix, of a part that may be packed; of embeddings bitsandbytes has no packed form."""
    if tensor.name == POSITIONS or (tensor.name.startswith(VISION) and not quantize_vision):
        return False
    return len(tensor.shape) == 2 and not (wanted.name == "nf4" and tensor.name == EMBEDDING)


def _is_kept(tensor: TensorInfo) -> bool:
    """Whether it is of the mixture that a file's encoding is, or packed already."""
    return not tensor.name.startswith(VISION) or _stays_packed(tensor)


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
