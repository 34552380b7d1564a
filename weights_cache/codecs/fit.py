"""Groups of weights in, the scales and integer codes that stand for them with little squared error out.

Knows what numbers an encoding can hold, but not how they lie in bytes. Nothing here follows ggml's procedure, only
its set of storable values: candidate scales are tried, their codes are what rounding gives, the best one stays.
A value per group is [groups], one per super-block [supers], and a table has a first dimension of candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .groups import HALF_MAX, Groups, Scratch, inverted, pick, stored, stored_step

Q4_0_REACHES = (-8.0, -8.6, 7.2)
"""q4_0: the code, or the point between codes, on which a candidate scale lays the largest weight of a group."""

Q6_K_PLANS = (
    (1.0, (1.0, -1.032)),
    (1.03, (0.95, 0.9625, 0.975, 0.9875, 1.0, 1.0125, 1.025, 1.0375, 1.05, -0.97, -0.995, -1.02, -1.045)),
)
"""q6_k: how far the step of a super-block is widened, and the factors that it then tries on each group's scale.

The first plan finds blocks that were in q6_k before; the second has room for scales above the plain one.
"""

Q4_K_REACHES = ((14.3, 0.0), (14.3, 0.7), (15.0, 0.0), (15.7, 0.0), (15.7, -0.7), (16.4, -0.7))
"""q4_k: over how many codes a candidate spreads a group, and the code on which it lays the lowest weight."""

Q4_K_SCALES = (-1.0, 0.0, 1.0)
"""q4_k: how far from the plain multiple of the step a group's scale is tried."""


class Offsets(NamedTuple):
    """q4_k's super-blocks: a weight is scale_step * scales * code - offset_step * offsets."""

    scale_step: Tensor  # [supers], exact in float16
    offset_step: Tensor  # [supers], exact in float16
    scales: Tensor  # [supers, 8], whole, 0..63
    offsets: Tensor  # [supers, 8], whole, 0..63


class Multiples(NamedTuple):
    """q6_k's super-blocks: a weight is step * scales * code."""

    error: Tensor  # [supers]
    step: Tensor  # [supers], exact in float16
    scales: Tensor  # [supers, 16], whole, -128..127

    @property
    def worth(self) -> Tensor:
        """What one code is worth in each group: [groups]."""
        return _each(self.step, self.scales)


def signed_bytes(weights: Tensor, scratch: Scratch) -> tuple[Tensor, Groups]:
    """q8_0: groups of 32 with a float16 scale and codes -127..127; the largest weight is laid on 127 or -127.

    So many codes leave nothing to search for, but for subnormal scales: these are far apart, and either side is tried.
    """
    x = Groups(weights, scratch, 32, -127 * HALF_MAX, 127 * HALF_MAX)
    plain = x.extreme.abs() / 127
    scales = torch.stack([stored(plain), stored_step(plain)])
    _, scale = pick(x.errors(scales, -127, 127), scales)
    x.round_to(inverted(scale), -127, 127)
    return scale, x


def signed_nibbles(weights: Tensor, scratch: Scratch) -> tuple[Tensor, Groups]:
    """q4_0: groups of 32 with a float16 scale and codes -8..7.

    The codes of a scale suit another one better: dot / square, which leaves dot^2 / square of the group's squares
    explained. The winner is then compared, as it is stored, with the plain rule "the largest weight is code -8": so
    no group comes out worse than by that.
    """
    x = Groups(weights, scratch, 32, -8 * HALF_MAX, 8 * HALF_MAX)
    tried = []
    for inverse in torch.outer(x.extreme.new_tensor(Q4_0_REACHES), inverted(x.extreme)):
        x.round_to(inverse, -8, 7)
        tried.append(x.products())
    square, dot = map(torch.stack, zip(*tried, strict=True))
    _, best = pick(-dot * dot / square, dot / square)
    scales = stored(torch.stack([best, x.extreme / -8]).nan_to_num_(0.0))
    _, scale = pick(x.errors(scales, -8, 7), scales)
    x.round_to(inverted(scale), -8, 7)
    return scale, x


def signed_six_bits(weights: Tensor, scratch: Scratch) -> tuple[Multiples, Groups]:
    """q6_k: groups of 16 with codes -32..31, whose scales are whole multiples of a float16 step.

    Only scales that can be stored are tried, so what is measured is what will be read.
    """
    x = Groups(weights, scratch, 16, -HALF_MAX * 128 * 32, HALF_MAX * 128 * 32)
    widest = x.extreme.view(-1, 16)
    widest = widest.gather(1, widest.abs().max(1, keepdim=True).indices)[:, 0]
    found = [_multiples(x, widest * spread / (128 * 32), factors) for spread, factors in Q6_K_PLANS]
    best = Multiples(*_least(found + [_refitted_multiples(x, found[-1])]))
    x.round_to(inverted(best.worth), -32, 31)
    return best, x


def _multiples(x: Groups, step: Tensor, factors: tuple[float, ...]) -> Multiples:
    """Each group's best whole multiple of a step, of those near `factors` times the plain one."""
    step = stored_step(step)
    wide = step.repeat_interleave(16)
    plain = x.extreme * inverted(wide) / -32
    tried = torch.outer(plain.new_tensor(factors), plain).round_().clamp_(-128, 127)
    error, scales = pick(x.errors(tried * wide, -32, 31), tried)
    return Multiples(error.view(-1, 16).sum(1), step, scales.view(-1, 16))


def _refitted_multiples(x: Groups, found: Multiples) -> Multiples:
    """The same multiples of the step that suits their codes best."""
    x.round_to(inverted(found.worth), -32, 31)
    square, dot = (part.view(-1, 16) for part in x.products())
    step = stored((dot * found.scales).sum(1) * inverted((square * found.scales.square()).sum(1)))
    refitted = found._replace(step=step)
    error = x.errors(refitted.worth.unsqueeze(0), -32, 31)
    return refitted._replace(error=error.view(-1, 16).sum(1))


def offset_nibbles(weights: Tensor, scratch: Scratch) -> tuple[Offsets, Groups]:
    """q4_k: groups of 32 with codes 0..15, whose scales and offsets are whole multiples of two float16 steps.

    First every group by itself, with any scale and offset; the largest of these set the steps. Then the whole
    multiples near them, judged by what will be read.
    """
    x = Groups(weights, scratch, 32, -HALF_MAX * 63, HALF_MAX * 63 * 15)
    scale, offset = _free_offsets(x)
    scale_step, offset_step = (stored_step(part.view(-1, 8).amax(1) / 63) for part in (scale, offset))
    scales, offsets = _whole_offsets(x, scale, offset, scale_step, offset_step)
    _offset_codes(x, _each(scale_step, scales), _each(offset_step, offsets))
    return Offsets(scale_step, offset_step, scales, offsets), x


def _free_offsets(x: Groups) -> tuple[Tensor, Tensor]:
    """Each group's best scale and offset >= 0, of any size: two of [groups].

    The candidates' codes, once there, determine the best scale and offset for them: a line through 32 points.
    """
    low, total = x.low.clamp_max(0), x.x.sum(0)
    spread, tried = inverted(x.high - low), []
    for reach, lowest in Q4_K_REACHES:
        x.round_to(spread * reach, 0, 15, offset=low * spread * -reach + lowest)
        tried.append(x.sums())
    plain, square, dot = map(torch.stack, zip(*tried, strict=True))
    slope = (32 * dot - total * plain) * inverted(32 * square - plain * plain)
    offset = ((slope * plain - total) / 32).clamp_min_(0)
    dot += offset * plain
    scale = dot * inverted(square)
    error = offset * (2 * total + 32 * offset) - scale * dot  # less the weights' own squares, the same for all
    return tuple(pick(error, scale, offset)[1:])


def _whole_offsets(
    x: Groups, scale: Tensor, offset: Tensor, scale_step: Tensor, offset_step: Tensor
) -> tuple[Tensor, Tensor]:
    """The best whole multiples [supers, 8] of the steps near `scale` and `offset` [groups].

    Each scale is tried with three offsets: the one given, and those that lay the lowest weight on code 0 or the
    highest on code 15. The codes that come of it then determine the best offset for them.
    """
    unit, base = scale_step.repeat_interleave(8), offset_step.repeat_interleave(8)
    per_base = inverted(base)
    scales = (scale * inverted(unit) + scale.new_tensor(Q4_K_SCALES).unsqueeze(1)).round_().clamp_(0, 63)
    worth = scales * unit
    starts = torch.cat([offset.expand_as(worth), -x.low.expand_as(worth), 15 * worth - x.high])
    scales, worth = scales.repeat(3, 1), worth.repeat(3, 1)
    left, square = _residuals(x, worth, starts.mul_(per_base).round_().clamp_(0, 63).mul_(base))
    offsets = (left * per_base / -32).round_().clamp_(0, 63)
    taken = offsets * base
    error = square + taken * (2 * left + 32 * taken)
    _, scales, offsets = pick(error, scales, offsets)
    return scales.view(-1, 8), offsets.view(-1, 8)


def _offset_codes(x: Groups, worth: Tensor, taken: Tensor) -> None:
    inverse = inverted(worth)
    x.round_to(inverse, 0, 15, offset=taken * inverse)


def _residuals(x: Groups, worth: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Tables of the sums of x - worth * code, and of their squares, with the codes that `taken` asks for."""
    tried = []
    for each, off in zip(worth, taken, strict=True):
        _offset_codes(x, each, off)
        tried.append(x.residual(each))
    left, square = map(torch.stack, zip(*tried, strict=True))
    return left, square


def _each(step: Tensor, multiples: Tensor) -> Tensor:
    """Per super-block a step, per group of it a multiple [supers, n] -> what one code is worth: [groups]."""
    return (step.unsqueeze(1) * multiples).flatten()


def _least(found: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Super-block by super-block the one of least error, which stands first."""
    tables = list(map(torch.stack, zip(*found, strict=True)))
    chosen = tables[0].min(0).indices
    return [table[chosen, torch.arange(len(chosen), device=chosen.device)] for table in tables]
