"""Computes the losses of a training batch: of the answers, and of the additional heads. Knows no optimizer.

Letters: B sequences, T tokens, M image tokens, S answers, P patches of an image, C hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pixtral_cli.model.vision import VisionLanguageModel
from pixtral_cli.tiny.scenes import BACKGROUNDS, COLOURS, SHAPES
from pixtral_cli.tiny.training.batches import ALL_KINDS, CHARACTERS, IGNORE, PATCH, Batch
from pixtral_cli.tiny.training.model import AttendInBatch, AttendPictures
from pixtral_cli.tiny.training.tokenizer import END_INST, IMG, IMG_END

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HARD = 2.5  # weight of answers that count: they are learned last
FACT_SIZES = (
    len(SHAPES) + 1,
    len(COLOURS) + 1,
    len(CHARACTERS) + 1,
    6,
    len(BACKGROUNDS),
    len(SHAPES) + 1,
    len(CHARACTERS) + 1,
)
SPARSE = (0, 1, 2, 3, 5, 6)  # facts that most patches have none of
MOST = 6  # shapes in a image, and a spare
LONGEST = 16  # rows or columns of the largest trained image


@dataclass
class Losses:
    """`answer` is a scalar, `seen` and `told` one loss a fact; `right` bool [S]: right to the last token."""

    answer: Tensor
    seen: Tensor
    told: Tensor
    right: Tensor
    kinds: Tensor


class VisionReading(NamedTuple):
    """Vision features [M, C], facts [M, 10] and (row, column) [M, 2] of all patches, in the order of [IMG] tokens."""

    features: Tensor
    facts: Tensor
    places: Tensor


class TrainingHeads(nn.Module):
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
        image, and how many shapes has it?"""
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


def losses(model: VisionLanguageModel, heads: TrainingHeads, batch: Batch, device: torch.device) -> Losses:
    """One forward pass over `batch`."""
    none = torch.zeros(1, device=device)
    looked = _look(model, batch, device) if batch.pixels else None
    seen = heads.see(looked.features, looked.facts) if looked else none
    ids, positions, groups = (torch.from_numpy(x).to(device) for x in (batch.ids, batch.positions, batch.groups))
    features = model.multi_modal_projector(looked.features, ()) if looked else None
    layers = model.language_model.layers
    with _watched(layers[1]) as halfway, _watched(layers[-2]) as late:
        x = model.embed(ids.flatten(), features)
        hidden = model(x, positions.flatten(), AttendInBatch(groups, model.dtype))
    told = _tell(heads, batch, looked, halfway[0], late[0]) if looked else none
    answer, right = _answer(model, hidden, batch, device)
    return Losses(answer, seen, told, right, torch.from_numpy(batch.kinds))


def looking_losses(model: VisionLanguageModel, heads: TrainingHeads, batch: Batch, device: torch.device) -> Losses:
    """The vision tower's part of `losses` alone."""
    looked, nothing = _look(model, batch, device), torch.zeros(0, device=device)
    seen = heads.see(looked.features, looked.facts)
    return Losses(seen.new_zeros(()), seen, nothing, nothing.bool(), nothing.long())


def _tell(heads: TrainingHeads, batch: Batch, looked: VisionReading, halfway: Tensor, late: Tensor) -> Tensor:
    """What the decoder knows of the image half-way, and before its last layer of the shape asked about."""
    flat = torch.from_numpy(batch.ids).to(halfway.device).flatten()
    told = heads.tell(halfway[flat == IMG], looked.facts, looked.places)
    last, shapes = _last_places(batch).to(flat.device), _shape_counts(batch).to(flat.device)
    ends = heads.measure(halfway[flat == IMG_END], last, shapes)
    pointed = heads.point(late[flat == END_INST], torch.from_numpy(batch.abouts).to(flat.device))
    return torch.cat([told, ends, 2 * pointed])


def _answer(model: VisionLanguageModel, hidden: Tensor, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
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
    """A list that receives the hidden states after the layer `module`."""
    seen: list[Tensor] = []
    watch = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0] + output[1]))
    try:
        yield seen
    finally:
        watch.remove()


def _look(model: VisionLanguageModel, batch: Batch, device: torch.device) -> VisionReading:
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
    return VisionReading(*(torch.cat(parts, dim=1).flatten(0, 1) for parts in (features, facts, places)))


def _last_places(batch: Batch) -> Tensor:
    """(row, column) of every image's last patch, in the order of [IMG_END] tokens: [B * slots, 2]."""
    corners = [(pixels.shape[1] // PATCH - 1, pixels.shape[2] // PATCH - 1) for pixels in batch.pixels]
    return torch.tensor(corners).repeat(len(batch.ids), 1)


def _shape_counts(batch: Batch) -> Tensor:
    """How many shapes each image has, in the order of [IMG_END] tokens: [B * slots]."""
    counts = [torch.from_numpy(facts[:, :, 7].max(1)) for facts in batch.facts]
    return torch.stack(counts, dim=1).flatten()


def _patches(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """uint8 [B, H, W, 3] -> normalised patches float [B, P, 3 * 16 * 16]."""
    mean, std = torch.tensor(MEAN, device=pixels.device), torch.tensor(STD, device=pixels.device)
    normal = (pixels / 255 - mean) / std
    tiles = normal.unflatten(1, (grid[0], PATCH)).unflatten(3, (grid[1], PATCH))  # [B, r, 16, c, 16, 3]
    return tiles.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
