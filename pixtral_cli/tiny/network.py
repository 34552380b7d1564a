"""Training batches in, losses out: the built-in model with the heads that exist only while it is trained.

The heads ask of every patch what it holds, after the vision tower and half-way through the decoder, and are thrown away
in the end: they make the model look at the picture minutes after the start. Letters: B sequences, T tokens, N = B * T,
H heads, D head_dim, C hidden size, P patches.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from pixtral_cli.model.config import ModelConfig
from pixtral_cli.model.llava import Llava

from .batches import ALL_KINDS, CHARACTERS, IGNORE, PATCH, Batch
from .scenes import BACKGROUNDS, COLOURS, SHAPES
from .tokenizer import END_INST, IMG, IMG_END, VOCABULARY

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
FACT_SIZES = (
    len(SHAPES) + 1, len(COLOURS) + 1, len(CHARACTERS) + 1, 6, len(BACKGROUNDS), len(SHAPES) + 1, len(CHARACTERS) + 1,
)
SPARSE = (0, 1, 2, 3, 5, 6)  # facts that most patches have none of
MOST = 6  # shapes in a picture, and a spare
LONGEST = 16  # rows or columns of the largest trained picture

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "dtype": "bfloat16",
    "image_token_index": IMG,
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 11,
    "text_config": {
        "model_type": "mistral",
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 11,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 64,
        "num_channels": 3,
        "image_size": 1024,
        "patch_size": PATCH,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def new_model(seed: int) -> Llava:
    """The built-in model before training: normal(0.02..), residual outputs scaled down by depth."""
    torch.manual_seed(seed)
    model = Llava(ModelConfig.from_dict(CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            (nn.init.zeros_ if name.endswith("bias") else nn.init.ones_)(parameter)
        else:
            fan_in = parameter[0].numel()
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 if "embed" in name else fan_in**-0.5 * (0.35 if residual else 1.0))
    return model


class AttendInBatch:
    """Every token sees the shared tokens and those of its own group before it; groups int [B, T]."""

    def __init__(self, groups: Tensor, dtype: torch.dtype) -> None:
        self.batch, length = groups.shape
        same = groups[:, :, None] == groups[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=groups.device).tril()
        seen = (same | (groups == 0)[:, None, :]) & causal
        self.bias = torch.zeros(seen.shape, dtype=dtype, device=groups.device).masked_fill_(~seen, float("-inf"))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, self.batch, self.bias[:, None])


class AttendPictures:
    """Equal-sized pictures: every patch sees the patches of its own picture."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, self.batch, None)


def _attend(q: Tensor, k: Tensor, v: Tensor, batch: int, bias: Tensor | None) -> Tensor:
    """q [N, H, D], k, v [N, K, D] -> [N, H, D]; spelled out on a CPU, where its backward pass is twice as quick."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, T, D]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v)) if group > 1 else (k, v)
    if q.is_cuda:
        return scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(0, 1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, T, T]
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)


class Teacher(nn.Module):
    """The heads of training: linear readers of what each patch holds."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.seen = nn.ModuleList(nn.Linear(vision_size, size) for size in FACT_SIZES)
        self.told = nn.ModuleList(nn.Linear(text_size, size) for size in (*FACT_SIZES[:4], LONGEST, LONGEST))
        self.counted = nn.ModuleList(nn.Linear(text_size, MOST + 1) for _ in range(3))
        self.asked = nn.ModuleList(nn.Linear(text_size, LONGEST) for _ in range(2))

    def see(self, features: Tensor, facts: Tensor) -> Tensor:
        """features [B * P, C], facts [B * P, 10] -> the loss of each fact [7]."""
        return _reading_loss(self.seen, features, facts, SPARSE)

    def tell(self, hidden: Tensor, facts: Tensor, places: Tensor) -> Tensor:
        """hidden [M, C] at the [IMG] tokens, facts [M, 10], places [M, 2] -> losses [9]."""
        told = _reading_loss(self.told, hidden, torch.cat([facts[:, :4], places], dim=1), SPARSE[:4])
        return torch.cat([told, _reading_loss(self.counted, hidden, facts[:, 7:], range(3))])

    def point(self, hidden: Tensor, abouts: Tensor) -> Tensor:
        """hidden [S, C] where questions end, abouts [S, 2] -> losses [2]: at which patch is the shape asked about?"""
        some = (abouts[:, 0] >= 0).nonzero()[:, 0]
        return _reading_loss(self.asked, hidden[some], abouts[some], ()) if len(some) else hidden.new_zeros(2)

    def measure(self, hidden: Tensor, last: Tensor, shapes: Tensor) -> Tensor:
        """hidden [M, C] at the [IMG_END] tokens, last [M, 2] row and column, shapes [M] -> losses [3]: how large is the
        picture, and how many shapes has it?"""
        heads = [*self.told[4:], self.counted[0]]
        return _reading_loss(heads, hidden, torch.cat([last, shapes[:, None]], dim=1), ())


def _reading_loss(heads: Iterable[nn.Module], features: Tensor, facts: Tensor, sparse: Sequence[int]) -> Tensor:
    """Mean cross entropy; where most patches hold nothing, those that hold something weigh as much as the rest."""
    losses = []
    for index, head in enumerate(heads):
        target = facts[:, index]
        loss = cross_entropy(head(features).float(), target, reduction="none")
        if index in sparse:
            some = target > 0
            loss = torch.where(some, loss / some.sum().clamp(min=1), loss / (~some).sum().clamp(min=1)).sum() / 2
        losses.append(loss if index in sparse else loss.mean())
    return torch.stack(losses)


@dataclass
class Losses:
    """`answer` is a scalar, `seen` and `told` one loss a fact; `right` bool [S] says which answers are right to the last token."""

    answer: Tensor
    seen: Tensor
    told: Tensor
    right: Tensor
    kinds: Tensor


def losses(model: Llava, teacher: Teacher, batch: Batch, device: torch.device, see_only: bool = False) -> Losses:
    """One forward pass over `batch`."""
    zero = torch.zeros(1, device=device)
    features, facts, places = _look(model, batch, device)
    seen = teacher.see(features, facts) if features is not None else zero
    if see_only:
        return Losses(zero[0], seen, zero, torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.long))
    ids, positions, groups, labels, answers = (
        torch.from_numpy(x).to(device) for x in (batch.ids, batch.positions, batch.groups, batch.labels, batch.answers)
    )
    projected = None if features is None else model.multi_modal_projector(features)
    flat = ids.flatten()
    with _watched(model.language_model.layers[1]) as halfway, _watched(model.language_model.layers[-2]) as late:
        hidden = model(model.embed(flat, projected), positions.flatten(), AttendInBatch(groups, model.dtype))
    told = zero
    if features is not None:
        told = teacher.tell(halfway[0][flat == IMG], facts, places)
        ends = teacher.measure(halfway[0][flat == IMG_END], _last_places(batch, device), _shape_counts(batch, device))
        pointed = teacher.point(late[0][flat == END_INST], torch.from_numpy(batch.abouts).to(device))
        told = torch.cat([told, ends, 2 * pointed])
    learned = (labels[:, 1:] != IGNORE).flatten().nonzero()[:, 0]
    before = hidden.unflatten(0, ids.shape)[:, :-1].flatten(0, 1)[learned]  # the token before each learned one
    target, answer = labels[:, 1:].flatten()[learned], answers[:, 1:].flatten()[learned]
    logits = model.logits(before)
    wrong = torch.zeros(len(batch.kinds), device=device).index_add_(0, answer, (logits.argmax(-1) != target).float())
    weight = answer.bincount(minlength=len(batch.kinds))[answer] ** -0.5  # a long answer weighs more, but not by its length
    answered = (cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    return Losses(answered, seen, told, wrong == 0, torch.from_numpy(batch.kinds))


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives what `module` returns."""
    seen: list[Tensor] = []
    watch = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        watch.remove()


def _look(model: Llava, batch: Batch, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Vision features [M, C], facts [M, 10] and (row, column) [M, 2] of all patches, in the order of [IMG] tokens."""
    if not batch.pixels:
        return None, None, None
    features, facts, places = [], [], []
    for pixels, fact in zip(batch.pixels, batch.facts, strict=True):
        count, height, width, _ = pixels.shape
        grid = height // PATCH, width // PATCH
        patches = _patches(torch.from_numpy(pixels).to(device), grid).to(model.dtype)
        seen = model.vision_tower(patches.flatten(0, 1), [grid] * count, AttendPictures(count))
        features.append(seen.unflatten(0, (count, -1)))
        facts.append(torch.from_numpy(fact).to(device))
        place = torch.cartesian_prod(torch.arange(grid[0], device=device), torch.arange(grid[1], device=device))
        places.append(place.expand(count, -1, -1))
    return tuple(torch.cat(parts, dim=1).flatten(0, 1) for parts in (features, facts, places))


def _last_places(batch: Batch, device: torch.device) -> Tensor:
    """(row, column) of every picture's last patch, in the order of [IMG_END] tokens: [B * slots, 2]."""
    corners = [(pixels.shape[1] // PATCH - 1, pixels.shape[2] // PATCH - 1) for pixels in batch.pixels]
    return torch.tensor(corners, device=device).repeat(len(batch.ids), 1)


def _shape_counts(batch: Batch, device: torch.device) -> Tensor:
    """How many shapes each picture has, in the order of [IMG_END] tokens: [B * slots]."""
    counts = [torch.from_numpy(facts[:, :, 7].max(1)) for facts in batch.facts]
    return torch.stack(counts, dim=1).flatten().to(device)


def _patches(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """uint8 [B, H, W, 3] -> normalised patches float [B, P, 3 * 16 * 16]."""
    mean, std = torch.tensor(MEAN, device=pixels.device), torch.tensor(STD, device=pixels.device)
    normal = (pixels / 255 - mean) / std
    tiles = normal.unflatten(1, (grid[0], PATCH)).unflatten(3, (grid[1], PATCH))  # [B, r, 16, c, 16, 3]
    return tiles.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


def kind_names() -> tuple[str, ...]:
    return ALL_KINDS
