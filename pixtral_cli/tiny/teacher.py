"""Hidden states in, losses of what they should tell out: the heads that exist only while the model is trained.

They ask of every patch what it holds, after the vision tower and half-way through the decoder, and of every question
where the shape lies that it is about; they make the model look minutes after the start, and are thrown away in the
end. Letters: B pictures, P patches of each, M tokens, S questions, C hidden size.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .patches import CHARACTERS
from .scenes import BACKGROUNDS, COLOURS, SHAPES

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
MOST = 6  # shapes in a picture, and a spare
LONGEST = 16  # rows or columns of the largest trained picture


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
