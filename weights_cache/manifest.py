"""What a serialized model says of itself, as JSON, in; a Manifest that agrees with the file's tensors out.

A seal says that a file is as it was written, not that its writer meant well: so every field is checked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .encodings import ENCODINGS
from .errors import CheckpointCorrupt, SerializedTooNew
from .formats.reader import TensorInfo
from .json_fields import CheckpointFields
from .layout import FORMS

VERSION = 2
"""Written from now on. In version 1, q4_0 and q4_k lay row by row only: such a file is read as well."""


@dataclass(frozen=True)
class Manifest:
    """What a serialized model says of itself. `form` is the checkpoint's it came from, which decides the picture
    recipe; `tensors` gives each weight's codec name and true shape."""

    model: str
    form: str
    encoding: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    version: int = VERSION

    @classmethod
    def read(cls, path: Path, raw: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> "Manifest":
        """The manifest `raw` of a file that has the tensors `stored`. Raises CheckpointCorrupt."""
        fields = CheckpointFields(raw, path)
        model, form, encoding = (fields.text(key, "") for key in ("model", "form", "encoding"))
        if form not in FORMS:
            raise CheckpointCorrupt(path, f"its manifest names the form {form[:40]!r}, and there is none")
        described = raw.get("tensors")
        if not isinstance(described, dict):
            raise CheckpointCorrupt(path, "its manifest does not say what its tensors are")
        return cls(model, form, encoding, {name: _tensor(path, name, said, stored) for name, said in described.items()})


def check_version(path: Path, found: Any) -> None:
    """Raises SerializedTooNew, and CheckpointCorrupt for what is no version."""
    if type(found) is not int:
        raise CheckpointCorrupt(path, f"its manifest has {str(found)[:40]!r} for a version")
    if not 1 <= found <= VERSION:
        raise SerializedTooNew(path, found, VERSION)


def read_hashes(path: Path, raw: Mapping[str, Any], wanted: set[str]) -> dict[str, str]:
    """The hashes that `raw` gives, one for each of the tensors `wanted`. Raises CheckpointCorrupt."""
    hashes = raw.get("sha256")
    if not isinstance(hashes, dict) or hashes.keys() != wanted:
        raise CheckpointCorrupt(path, "its manifest does not have a hash for each of its tensors")
    return hashes


def _tensor(path: Path, name: str, said: Any, stored: Mapping[str, TensorInfo]) -> tuple[str, tuple[int, ...]]:
    """A tensor's encoding and true shape, if it is stored as they ask for."""

    def corrupt(reason: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(path, f"its manifest {reason} {name[:200]!r}")

    if name not in stored:
        raise corrupt("names a tensor that it does not hold:")
    encoding, shape = said if isinstance(said, list) and len(said) == 2 else (None, None)
    if not isinstance(encoding, str) or not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise corrupt("does not give an encoding and a shape of")
    if _stored_shape(stored[name], encoding, shape) != stored[name].shape:
        raise corrupt(f"gives {encoding[:40]!r} {str(shape)[:80]} for another content of")
    return encoding, tuple(shape)


def _stored_shape(info: TensorInfo, encoding: str, shape: list[int]) -> tuple[int, ...] | None:
    """How a tensor of that encoding and shape is stored: as it is, or packed as bytes; None for neither."""
    if encoding == info.encoding:
        return tuple(shape)
    kind = ENCODINGS.get(encoding)
    if kind is None or kind.block == 1 or info.dtype != "U8" or not shape:
        return None
    rows, columns = prod(shape[:-1]), shape[-1]
    if encoding == "nf4":  # the codes, two of them in a byte; their scales are tensors of their own
        width, in_kernel_order = columns // 2, (columns // 2, kind.kernel_rows)
        whole = columns % 2 == 0
    else:
        width, in_kernel_order = columns // kind.block * kind.block_bytes, (columns, kind.kernel_rows // 2)
        whole = kind.fits(columns)
    if not whole:
        return None
    if len(info.shape) == 3 and kind.kernel_rows and rows % kind.kernel_rows == 0:
        return rows // kind.kernel_rows, *in_kernel_order
    return rows, width
