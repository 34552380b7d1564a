"""Headers and a config in, the bytes that a model takes out; and a refusal in figures where they are not there.

Reads no weights and needs no torch. Letters: C hidden_size, F intermediate_size, H query heads, K key-value heads, D
head_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from pixtral_cli.encoding_choices import CHOICES, kv_encoding
from pixtral_cli.errors import ModelError
from pixtral_cli.model import card_bits
from pixtral_cli.model.config import ModelConfig, TextConfig, TowerConfig
from pixtral_cli.model.free_memory import Device, Kind, free_bytes, kind_of
from pixtral_cli.model.pass_sizes import GRAPH_ROWS, IMAGE_CACHE, PATCHES, PREFILL, SCORED
from pixtral_cli.model.placement import Placement, place
from weights_cache.encodings import ENCODINGS
from weights_cache.formats.reader import TensorInfo

if TYPE_CHECKING:
    import torch

WORKSPACE = 256 * 2**20  # bytes; on a CPU, activations and buffers beside the weights, but those of larger images
LENGTHS = (4096, 32768, 131072)  # tokens
GIB = 2**30
FP8_SCALE = 1  # byte for the numbers of a head and token that fp8 keeps
KV_SHARE = 0.9  # of what the weights leave on a CPU: some is for images on their way
LEAST = 256  # tokens, with which something can be asked

CONTEXT = 512 * 2**20
"""Bytes that CUDA takes of a card when a process begins to use it."""
LIBRARIES = 256 * 2**20
"""Bytes of a card for kernels that are loaded when they are first used: cuBLAS', torch's, Triton's and ours."""
WORKSPACES = 3 * 32 * 2**20
"""Bytes that cuBLAS works in, on a Hopper card: on torch's stream, and on those on which a graph's passes are tried and
captured."""
MARGIN, MARGIN_SHARE = 256 * 2**20, 0.03
"""Bytes of a card that are left free, at least, and the part of what was free: allocators lose some between their
blocks, and a card that draws a screen is asked for more by others."""
GRAPH = 8 * 2**20
"""Bytes of a captured graph beside what it computes in: its nodes and their parameters."""
VECTORS = 6
"""Vectors [C] of a token that live at one time in a layer: the residual and what is added to it, those of the layer
before, which its caller holds, the normed sum, and the embedded tokens."""
ROTARY = 3
"""Vectors [D] of a token that rotate its heads: cos and sin, and the angle of each half in float32."""
LOGIT_BYTES, SORTING = 64, 16
"""Bytes for each logit of a row that is sampled with every option: itself in float32, what its alterations, filters and
draw make of it, and what a card's sort works in."""


@dataclass(frozen=True)
class Work:
    """What an engine may have to do at once: `batch` sequences of up to `context` tokens. `image_cache` is in bytes."""

    batch: int = 1
    context: int = 131072
    image_cache: int = 0
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True)
class Plan:
    """Bytes that a model takes on a device, by what takes them.

    `weights` are those that are loaded, `kernels` what a card's kernels have beside them from the start. `passes` is
    the largest pass: its activations and buffers. `images` are features that are kept. `graphs`, `libraries` and
    `context` are a card's, see the constants. A token's keys and values take `token`, and are given `share` of what all
    else leaves.
    """

    weights: int
    kernels: int
    passes: int
    token: int
    images: int = 0
    graphs: int = 0
    libraries: int = 0
    context: int = 0
    share: float = 1.0

    @property
    def working(self) -> int:
        """What is taken after the weights, keys and values not counted."""
        return self.passes + self.images + self.graphs + self.libraries

    @property
    def beside(self) -> int:
        """What is taken but for keys and values, in a process that has begun to use the device."""
        return self.weights + self.kernels + self.working

    def total(self, tokens: int) -> int:
        """Everything, with keys and values of `tokens`, in a process that is still to begin."""
        return self.context + self.beside + tokens * self.token

    def taken(self, tokens: int) -> int:
        """What torch's allocator takes of a card for all this: `free_memory.taken_bytes` counts it."""
        return self.beside - self.libraries + tokens * self.token

    def margin(self, free: int) -> int:
        """Of so many bytes that were free, those to be left so."""
        return max(MARGIN, int(free * MARGIN_SHARE)) if self.context else 0

    def fits(self, free: int, tokens: int) -> bool:
        """Whether everything fits in a process that is still to begin."""
        return self.total(tokens) + self.margin(free) <= free

    def room(self, free: int, loaded: bool = False) -> int:
        """Tokens whose keys and values `free` bytes hold beside all else, of which the weights may be `loaded`."""
        left = free - self.margin(free) - (self.working if loaded else self.beside)
        return int(left * self.share) // self.token


def plan(tensors: Mapping[str, TensorInfo], placement: Placement, config: ModelConfig, kind: Kind, work: Work) -> Plan:
    """What a model in `placement` takes on a CPU or a GPU."""
    token = kv_bytes(config.text, 1, kv_encoding(work.kv_cache_dtype, placement.dtype))
    weights = weight_bytes(tensors, placement)
    width = ENCODINGS[placement.dtype].block_bytes
    if kind == "cpu":
        return Plan(weights, 0, max(WORKSPACE, cpu_image_bytes(config, width)), token, share=KV_SHARE)
    return Plan(
        weights,
        card_kernel_bytes(tensors, placement),
        pass_bytes(config, width, work) + WORKSPACES,
        token,
        work.image_cache if config.vision else 0,
        graph_bytes(config.text, width, work.batch),
        LIBRARIES,
        CONTEXT,
    )


def weight_bytes(tensors: Mapping[str, TensorInfo], placement: Placement) -> int:
    """Bytes that the weights take as `placement` says: those of the file where it has them so."""
    return sum(_bytes_in(placement.encodings[name], tensor) for name, tensor in tensors.items())


def _bytes_in(encoding: str, tensor: TensorInfo) -> int:
    return tensor.nbytes if encoding == tensor.encoding else ENCODINGS[encoding].nbytes(tensor.shape)


def card_kernel_bytes(tensors: Mapping[str, TensorInfo], placement: Placement) -> int:
    """Bytes that a card's kernels have beside these weights: what their own order adds to packed ones, and the buffer
    that they are decoded into."""
    beside, buffer = 0.0, 0
    for name, tensor in tensors.items():
        encoding = placement.encodings[name]
        if len(tensor.shape) != 2 or not ENCODINGS[encoding].packed:
            continue
        rows, columns = tensor.shape
        beside += rows * columns * card_bits.bits_on_card(encoding, rows, columns) / 8 - _bytes_in(encoding, tensor)
        buffer = card_bits.BUFFER if card_bits.fits(encoding, rows, columns) else buffer
    return int(beside) + buffer


def pass_bytes(config: ModelConfig, width: int, work: Work) -> int:
    """Bytes of the largest pass on a card, in numbers of `width` bytes: a prefill, the tower's, or that of the logits,
    which follow a prefill."""
    text, tokens = config.text, min(PREFILL, work.batch * work.context)
    prefill = tokens * width * _numbers(text)
    logits = max(work.batch, SCORED) * text.vocab_size * LOGIT_BYTES + tokens * width * text.hidden_size
    return max(prefill, logits, PATCHES * width * _numbers_of_a_patch(config.vision, text) if config.vision else 0)


def _numbers(config: TextConfig | TowerConfig) -> int:
    """Numbers of a token or patch that live at one time in a layer: VECTORS and ROTARY, and either gate, up and their
    product, 3 F, or q, k, v and what attention makes of them, (2 H + 2 K) D."""
    kv_heads = config.num_kv_heads if isinstance(config, TextConfig) else config.num_heads
    attention = 2 * (config.num_heads + kv_heads) * config.head_dim
    vectors = VECTORS * config.hidden_size + ROTARY * config.head_dim
    return vectors + max(3 * config.intermediate_size, attention)


def _numbers_of_a_patch(vision: TowerConfig, text: TextConfig) -> int:
    """The same for a patch, with its pixels: in the tower, or in the projector (three vectors of the decoder)."""
    return vision.num_channels * vision.patch_size**2 + max(_numbers(vision), 3 * text.hidden_size)


def cpu_image_bytes(config: ModelConfig, width: int) -> int:
    """Bytes of the largest image's pass through the tower on a CPU, whose feed-forward layers take it in pieces."""
    if config.vision is None or config.image_layout is None:
        return 0
    pixels = config.vision.num_channels * config.vision.patch_size**2
    side = -(-config.image_layout.longest_side // config.vision.patch_size)
    return side**2 * width * (pixels + _numbers(replace(config.vision, intermediate_size=0)))


def graph_bytes(text: TextConfig, width: int, batch: int) -> int:
    """Bytes of the captured steps of up to `batch` sequences: they compute in the same memory, that of the largest; its
    logits are there as computed, in float32, and where they are read."""
    graphs = 1 + sum(rows < batch for rows in GRAPH_ROWS)
    return graphs * GRAPH + batch * (width * _numbers(text) + (width + 4 + 4) * text.vocab_size)


def kv_bytes(config: TextConfig, tokens: int, kept: str) -> int:
    """Bytes of keys and values for `tokens` tokens, which are kept as "fp8" (a byte a number, and FP8_SCALE) or in one
    of torch's dtypes."""
    numbers = config.head_dim + FP8_SCALE if kept == "fp8" else config.head_dim * ENCODINGS[kept].block_bytes
    return 2 * config.num_layers * config.num_kv_heads * numbers * tokens


@dataclass(frozen=True)
class Need:
    """What a model needs in `encoding` for one sequence, on each kind of device, and bytes of keys and values for each
    length in tokens."""

    encoding: str
    plans: Mapping[Kind, Plan]
    cache: Mapping[int, int]

    @property
    def weights(self) -> int:
        return self.plans["cpu"].weights

    def total(self, tokens: int) -> int:
        """Bytes for a sequence of `tokens`, one of the lengths, on any device: what only a GPU takes is not counted."""
        return self.weights + self.cache[tokens] + self.plans["cpu"].passes

    def on(self, device: Device, tokens: int) -> int:
        """Bytes of everything that is taken of `device` for such a sequence."""
        return self.plans[device.kind].total(tokens)

    def fits(self, device: Device, tokens: int) -> bool | None:
        """Whether that is free on `device`, and a margin on a GPU; None where nobody says."""
        return None if device.free is None else self.plans[device.kind].fits(device.free, tokens)


def needs(tensors: Mapping[str, TensorInfo], config: ModelConfig, kv_cache_dtype: str = "auto") -> list[Need]:
    """One Need for each encoding that can be asked for; the file's own comes first, if it is another."""
    placements = [place(tensors, None), *(place(tensors, ENCODINGS[name]) for name in CHOICES)]
    unique = {placement.label: placement for placement in reversed(placements)}
    work, kinds = Work(image_cache=IMAGE_CACHE, kv_cache_dtype=kv_cache_dtype), get_args(Kind)
    found = []
    for placement in (unique[label] for label in dict.fromkeys(each.label for each in placements)):
        plans = {kind: plan(tensors, placement, config, kind, work) for kind in kinds}
        cache = {tokens: plans["cpu"].token * tokens for tokens in lengths(config.text)}
        found.append(Need(placement.label, plans, cache))
    return found


def lengths(config: TextConfig, wanted: Sequence[int] = LENGTHS) -> list[int]:
    """Those of the lengths that the model can have, and its own."""
    return sorted({*(tokens for tokens in wanted if tokens < config.max_length), config.max_length})


def check_weights(
    tensors: Mapping[str, TensorInfo], placement: Placement, config: ModelConfig, device: torch.device, work: Work
) -> Plan:
    """The plan. Raises ModelError, with both figures and what would fit, when the weights cannot fit on `device`."""
    kind = kind_of(device)
    wanted, free = plan(tensors, placement, config, kind, work), free_bytes(device)
    if free is None or wanted.beside <= free:
        return wanted
    others = {name: plan(tensors, place(tensors, ENCODINGS[name]), config, kind, work) for name in CHOICES}
    fitting = [name for name, other in others.items() if other.beside <= free]
    if fitting:
        hint = f"Use --quantization-encoding {fitting[0]}, which needs {others[fitting[0]].beside / GIB:.1f} GiB."
    else:
        hint = "No encoding fits: free memory, take a smaller model" + (
            " or use --devices cpu." if kind == "gpu" else " or a larger machine."
        )
    raise ModelError(
        f"This model in {placement.label} needs {wanted.beside / GIB:.1f} GiB of memory, "
        f"and {_name(device)} has {free / GIB:.1f} GiB free.",
        hint=hint,
    )


def _name(device: torch.device) -> str:
    """As --devices takes it."""
    return "cpu" if device.type == "cpu" else f"gpu-{device.index or 0}"


def kv_tokens(
    planned: Plan, device: torch.device, wanted: int, memory: int | None = None, *, loaded: bool = False
) -> int:
    """Tokens whose keys and values there is room for: `wanted`, or as many as `memory` bytes hold; without such a
    bound, and on a card in any case, as many as fit on `device` beside weights that are `loaded`, or not yet.

    Raises ModelError when there is no room for as many as LEAST.
    """
    token, least = planned.token, min(LEAST, wanted)
    if memory is not None:
        if memory // token < least:
            raise ModelError(
                f"--kv-cache-memory has room for {memory // token} tokens.",
                hint=f"Give at least {-(-LEAST * token // 2**20)}MiB; the longest prompt and its answer must fit.",
            )
        wanted = min(memory // token, wanted)
    free = free_bytes(device) if memory is None or device.type != "cpu" else None
    if free is None:
        return wanted
    room = planned.room(free, loaded)
    if room < least:
        raise ModelError(
            f"The weights leave {max(room, 0) * token / GIB:.1f} GiB on {_name(device)} for keys and values: "
            f"{max(room, 0)} tokens.",
            hint="Free memory, or take a smaller encoding with --quantization-encoding.",
        )
    return min(room, wanted)
