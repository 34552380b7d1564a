"""A weights file of a repository in, a local file with its header and its length out. Fetches no weights.

Readers map a file and touch only what they are asked for. So a file of the true length that has nothing but its
header serves them for names, shapes and encodings; the rest is a hole, which takes no room on a disk.
"""

import os
from pathlib import Path
from typing import Any

from . import layout
from .errors import CheckpointCorrupt, DownloadFailed
from .formats.gguf import LEAST_BYTES, Header
from .formats.reader import map_file
from .formats.safetensors import LENGTH_BYTES, MAX_HEADER_BYTES
from .replacing import replacing

FIRST = {layout.SAFETENSORS: 2**18, layout.GGUF: 2**23}
"""Bytes to ask for first: the headers of nearly all files (a GGUF has its tokenizer there)."""

MOST = MAX_HEADER_BYTES + LENGTH_BYTES


def write(transfer: Any, name: str, path: Path) -> None:
    """Write the header of `name` to `path`, whole or not at all. Raises DownloadFailed, and the library's errors."""
    size = transfer.contents[name].size
    if size is None:
        raise DownloadFailed(transfer.label, f"the Hub does not say how long {name} is")
    with replacing(path) as temporary:
        _write(transfer, name, size, temporary)


def _write(transfer: Any, name: str, size: int, path: Path) -> None:
    have, wanted = 0, min(FIRST.get(Path(name).suffix, LENGTH_BYTES), size)
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)
        while have < wanted:
            data = _piece(transfer, name, have, wanted)
            if len(data) < wanted - have:
                raise DownloadFailed(transfer.label, f"{name} is shorter than the Hub's listing says")
            file.write(data)
            file.flush()
            have, wanted = wanted, min(_needed(name, path, wanted), size, MOST)


def _piece(transfer: Any, name: str, begin: int, end: int) -> bytes:
    """The bytes [begin, end) of the file; a server that knows no ranges is left once they have come."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(transfer.repo, name, revision=transfer.commit, endpoint=transfer.endpoint)
    asked = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=asked, follow_redirects=True) as response:
        hf_raise_for_status(response)
        skipped = begin if response.status_code == 200 else 0
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= skipped + end - begin:
                break
    return bytes(data[skipped : skipped + end - begin])


def _needed(name: str, path: Path, have: int) -> int:
    """How many bytes the header takes, by what is known from `have` of them; twice as many while nobody knows."""
    if name.endswith(layout.SAFETENSORS):
        with path.open("rb") as file:
            return LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
    try:
        Header(path, map_file(path, LEAST_BYTES, "GGUF"))
    except CheckpointCorrupt:
        return 2 * have
    return have
