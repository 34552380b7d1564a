"""A training batch in, its losses out: answers, and what the heads of training read. Knows no optimizer.

Letters: B sequences, T tokens, M image tokens, S answers, P patches of a picture, C hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pixtral_cli.model.vision import PixtralModel

from .batches import ALL_KINDS, IGNORE, Batch
from .network import AttendInBatch, AttendPictures
from .patches import PATCH
from .teacher import Teacher
from .tokenizer import END_INST, IMG, IMG_END

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HARD = 2.5  # weight of answers that count: they are learned last


@dataclass
class Losses:
    """`answer` is a scalar, `seen` and `told` one loss a fact; `right` bool [S]: right to the last token."""

    answer: Tensor
    seen: Tensor
    told: Tensor
    right: Tensor
    kinds: Tensor


class Looked(NamedTuple):
    """Vision features [M, C], facts [M, 10] and (row, column) [M, 2] of all patches, in the order of [IMG] tokens."""

    features: Tensor
    facts: Tensor
    places: Tensor


def losses(model: PixtralModel, teacher: Teacher, batch: Batch, device: torch.device) -> Losses:
    """One forward pass over `batch`."""
    none = torch.zeros(1, device=device)
    looked = _look(model, batch, device) if batch.pixels else None
    seen = teacher.see(looked.features, looked.facts) if looked else none
    ids, positions, groups = (torch.from_numpy(x).to(device) for x in (batch.ids, batch.positions, batch.groups))
    features = model.multi_modal_projector(looked.features) if looked else None
    layers = model.language_model.layers
    with _watched(layers[1]) as halfway, _watched(layers[-2]) as late:
        x = model.embed(ids.flatten(), features)
        hidden = model(x, positions.flatten(), AttendInBatch(groups, model.dtype))
    told = _tell(teacher, batch, looked, halfway[0], late[0]) if looked else none
    answer, right = _answer(model, hidden, batch, device)
    return Losses(answer, seen, told, right, torch.from_numpy(batch.kinds))


def looking_losses(model: PixtralModel, teacher: Teacher, batch: Batch, device: torch.device) -> Losses:
    """The vision tower's part of `losses` alone."""
    looked, nothing = _look(model, batch, device), torch.zeros(0, device=device)
    seen = teacher.see(looked.features, looked.facts)
    return Losses(seen.new_zeros(()), seen, nothing, nothing.bool(), nothing.long())


def _tell(teacher: Teacher, batch: Batch, looked: Looked, halfway: Tensor, late: Tensor) -> Tensor:
    """What the decoder knows of the picture half-way, and before its last layer of the shape asked about."""
    flat = torch.from_numpy(batch.ids).to(halfway.device).flatten()
    told = teacher.tell(halfway[flat == IMG], looked.facts, looked.places)
    last, shapes = _last_places(batch).to(flat.device), _shape_counts(batch).to(flat.device)
    ends = teacher.measure(halfway[flat == IMG_END], last, shapes)
    pointed = teacher.point(late[flat == END_INST], torch.from_numpy(batch.abouts).to(flat.device))
    return torch.cat([told, ends, 2 * pointed])


def _answer(model: PixtralModel, hidden: Tensor, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss over the tokens of answers, and which answers [S] are right to the last token."""
    labels, answers, kinds = (torch.from_numpy(x).to(device) for x in (batch.labels, batch.answers, batch.kinds))
    learned = (labels[:, 1:] != IGNORE).flatten().nonzero()[:, 0]
    before = hidden.unflatten(0, labels.shape)[:, :-1].flatten(0, 1)[learned]  # the token before each learned one
    target, answer = labels[:, 1:].flatten()[learned], answers[:, 1:].flatten()[learned]
    logits = model.logits(before)
    wrong = torch.zeros(len(kinds), device=device).index_add_(0, answer, (logits.argmax(-1) != target).float())
    weight = answer.bincount(minlength=len(kinds))[answer] ** -0.5  # long answers weigh more, not by their length
    weight = weight * torch.where(kinds == ALL_KINDS.index("count"), HARD, 1.0)[answer]
    loss = (cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    return loss, wrong == 0


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives what `module` returns."""
    seen: list[Tensor] = []
    watch = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        watch.remove()


def _look(model: PixtralModel, batch: Batch, device: torch.device) -> Looked:
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
    return Looked(*(torch.cat(parts, dim=1).flatten(0, 1) for parts in (features, facts, places)))


def _last_places(batch: Batch) -> Tensor:
    """(row, column) of every picture's last patch, in the order of [IMG_END] tokens: [B * slots, 2]."""
    corners = [(pixels.shape[1] // PATCH - 1, pixels.shape[2] // PATCH - 1) for pixels in batch.pixels]
    return torch.tensor(corners).repeat(len(batch.ids), 1)


def _shape_counts(batch: Batch) -> Tensor:
    """How many shapes each picture has, in the order of [IMG_END] tokens: [B * slots]."""
    counts = [torch.from_numpy(facts[:, :, 7].max(1)) for facts in batch.facts]
    return torch.stack(counts, dim=1).flatten()


def _patches(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """uint8 [B, H, W, 3] -> normalised patches float [B, P, 3 * 16 * 16]."""
    mean, std = torch.tensor(MEAN, device=pixels.device), torch.tensor(STD, device=pixels.device)
    normal = (pixels / 255 - mean) / std
    tiles = normal.unflatten(1, (grid[0], PATCH)).unflatten(3, (grid[1], PATCH))  # [B, r, 16, c, 16, 3]
    return tiles.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
