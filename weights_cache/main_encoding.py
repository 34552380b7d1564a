"""A weights file in, the encoding of most of its weights out, from its header and the config beside it."""

import os
from contextlib import suppress
from pathlib import Path

from . import layout
from .errors import WeightsError
from .formats.gguf import GgufFile
from .formats.reader import Reader
from .formats.safetensors import SafetensorsFile
from .json_fields import read_json_object


def of(path: Path, folder: Path) -> str | None:
    """The encoding that takes most bytes of the weights file `path`, or None; the config is in `folder`.

    The time at which the file was last used is not changed by reading its header.
    """
    if path.suffix not in (layout.SAFETENSORS, layout.GGUF) or not path.is_file():
        return None
    before = path.stat()
    try:
        reader: Reader = GgufFile(path) if path.suffix == layout.GGUF else SafetensorsFile(path)
        return _most_common(reader, folder)
    except WeightsError:
        return None
    finally:
        with suppress(OSError):
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _most_common(reader: Reader, folder: Path) -> str | None:
    if (folder / layout.CONFIG).is_file():
        method = read_json_object(folder / layout.CONFIG).get("quantization_config")
        if isinstance(method, dict) and method.get("load_in_4bit"):
            return str(method.get("bnb_4bit_quant_type", "nf4"))
    sizes: dict[str, int] = {}
    for tensor in reader.tensors.values():
        sizes[tensor.encoding] = sizes.get(tensor.encoding, 0) + tensor.nbytes
    return max(sizes, key=lambda name: sizes[name], default=None)
