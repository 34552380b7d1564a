"""An encoding's name in, its codec out: packed bytes to weights, weights to packed bytes. Knows no file format.

    codec = codecs.get("q4_k")
    packed = codec.encode(weights)  # float [..., columns] -> uint8 [..., codec.encoding.row_bytes(columns)]
    codec.decode(packed)            # float32 [..., columns], bit for bit what gguf-py makes of the same bytes

Names and sizes are those of encodings.py. All of NAMES decode, those in ENCODERS encode. Beside the codecs are the
weights that stay packed in memory, row by row: packed_rows.py, nf4.py.
Importing this package imports torch.
"""

from weights_cache.errors import UnknownEncoding

from .block_quants import CODECS as BLOCK_QUANTS
from .codec import Codec
from .float import CODECS as FLOATS
from .iq4 import CODECS as IQ4
from .k_quants import CODECS as K_QUANTS

__all__ = ["ENCODERS", "NAMES", "Codec", "get"]

_CODECS: dict[str, Codec] = {codec.name: codec for codec in (*FLOATS, *BLOCK_QUANTS, *K_QUANTS, *IQ4)}

NAMES: tuple[str, ...] = tuple(_CODECS)
"""Every encoding that can be decoded."""

ENCODERS: tuple[str, ...] = tuple(name for name, codec in _CODECS.items() if codec.encodes)
"""Every encoding that weights can be put into."""


def get(name: str) -> Codec:
    """The codec called `name`; raises UnknownEncoding, which lists the names there are."""
    try:
        return _CODECS[name]
    except KeyError:
        raise UnknownEncoding(name, NAMES) from None
