"""A model's sizes and encodings in, what a work has to read and to multiply out: so the least time that it can take.

Counted are, of what has to pass between memory and processor: the bytes of each weight that the work needs, once a
pass, as they are encoded (of the table of embeddings nothing, unless it is the head as well); keys and values, which
are read by every later token and written once, in the dtype that they are kept in. Of arithmetic: one multiplication a
weight of every matrix and token (the head's only where logits are wanted), and two products of attention, each of
query heads x head_dim numbers, with every token that is seen. Not counted are activations, norms, rotations, softmax,
and the arithmetic of decoding the weights.

A picture's tokens see all of its tokens. Letters: N tokens of a pass, B sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from pixtral_cli.model.config import ModelConfig, TextConfig
from weights_cache.formats.reader import TensorInfo
from weights_cache.names import EMBEDDING, HEAD, VISION


@dataclass(frozen=True)
class Need:
    """What a work needs: bytes between memory and processor, and multiplications (each with an addition)."""

    nbytes: int
    multiplications: int

    def seconds(self, bytes_a_second: float, operations_a_second: float) -> float:
        """The least time at those rates; a multiplication and its addition are two operations."""
        return max(self.nbytes / bytes_a_second, 2 * self.multiplications / operations_a_second)


@dataclass(frozen=True)
class Counts:
    """Of a model of `config` with these `tensors`; keys and values take `kv_width` bytes a number."""

    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    kv_width: int = 2

    @property
    def weight_bytes(self) -> int:
        """Of all of the model, its picture part too."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def _head(self) -> TensorInfo:
        return self.tensors.get(HEAD) or self.tensors[EMBEDDING]

    @property
    def _decoder(self) -> list[TensorInfo]:
        """The tensors of the text model's layers, and its last norm."""
        left_out = (EMBEDDING, HEAD)
        return [info for name, info in self.tensors.items() if name not in left_out and not name.startswith(VISION)]

    def _pass(self, tokens: int, logits: int, seen: int) -> Need:
        """One pass over N tokens, which see `seen` tokens together, with logits for some of them."""
        text = self.config.text
        decoder = sum(prod(info.shape) for info in self._decoder if len(info.shape) == 2)
        attention = 2 * text.num_heads * text.head_dim * seen
        return Need(
            sum(info.nbytes for info in self._decoder) + self._head.nbytes,
            tokens * decoder + logits * prod(self._head.shape) + attention,
        )

    def prefill(self, tokens: int) -> Need:
        """A prompt of N tokens, and the logits after it."""
        text = self.config.text
        need = self._pass(tokens, 1, _seen(text, 0, tokens))
        return Need(need.nbytes + tokens * text.num_layers * self._token_bytes, need.multiplications)

    def decode(self, context: int, tokens: int, batch: int) -> Need:
        """`tokens` passes, each of one token of B sequences that have `context` tokens before the first of them."""
        text = self.config.text
        seen = batch * _seen(text, context, tokens)
        one = self._pass(batch, batch, 0)
        attention = 2 * text.num_heads * text.head_dim * seen
        written = tokens * batch * text.num_layers
        return Need(
            tokens * one.nbytes + (seen + written) * self._token_bytes, tokens * one.multiplications + attention
        )

    @property
    def _token_bytes(self) -> int:
        """Of a token's key and value in one layer."""
        text = self.config.text
        return 2 * text.num_kv_heads * text.head_dim * self.kv_width

    def patches(self, width: int, height: int) -> int:
        """Of a picture of that many pixels."""
        assert self.config.vision is not None, self.config.architecture
        return (width // self.config.vision.patch_size) * (height // self.config.vision.patch_size)

    def picture(self, width: int, height: int) -> Need:
        """A picture of that many pixels: its patches through the tower, its tokens through the projector."""
        tower, layout = self.config.vision, self.config.image_layout
        assert tower is not None, self.config.architecture
        assert layout is not None, self.config.architecture
        patches = self.patches(width, height)
        rows = dict(zip(VISION, (patches, layout.tokens(width, height)), strict=True))
        tensors = [(info, rows[part]) for part in rows for name, info in self.tensors.items() if name.startswith(part)]
        matrices = sum(prod(info.shape) * times for info, times in tensors if len(info.shape) > 1)
        attention = 2 * tower.num_layers * tower.num_heads * tower.head_dim * patches**2
        return Need(sum(info.nbytes for info, _ in tensors), matrices + attention)


def _seen(text: TextConfig, context: int, tokens: int) -> int:
    """How many tokens, summed over layers, `tokens` of a sequence see that come after `context`: itself and those
    before it, within the window of the layer."""
    positions = range(context + 1, context + tokens + 1)
    return sum(sum(min(p, window or p) for p in positions) for window in text.sliding_windows)
