"""Groups of weights in, the scales and integer codes that stand for them with little squared error out.

Knows what numbers an encoding can hold, but not how they lie in bytes. Nothing here follows ggml's procedure, only
its set of storable values: candidate scales are tried, their codes are what rounding gives, the best one stays.
Groups stand as columns, [weights of a group, groups], so that torch works along the groups, many at once. A value per
group is [groups], one per super-block [supers], and a table has a first dimension of candidates.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .bits import Scratch

HALF_MAX = 65504.0
WORST = torch.finfo(torch.float32).max
HALF_STEP = 2.0**-24  # the smallest float16
HALF_PRECISION = 2.0**-11  # relative, where float16 is not subnormal


class Groups:
    """`x` [size, groups]: the weights; `codes`, of the same shape: what the last `round_to` made of them."""

    def __init__(self, weights: Tensor, scratch: Scratch, size: int, low: float, high: float) -> None:
        """float32 rows [n, block], contiguous, used up; those outside low..high, out of reach, are taken for these."""
        columns = weights.view(-1, size).t()
        self.x, self.codes = (scratch.array(name, *columns.shape) for name in ("x", "codes"))
        self.x.copy_(columns).clamp_(low, high)
        self._work = weights.view(columns.shape)

    @cached_property
    def low(self) -> Tensor:
        return self.x.amin(0)

    @cached_property
    def high(self) -> Tensor:
        return self.x.amax(0)

    @cached_property
    def extreme(self) -> Tensor:
        """The weight of largest magnitude of each group, with its sign."""
        return torch.where(-self.low > self.high, self.low, self.high)

    def round_to(self, inverse: Tensor, low: int, high: int, offset: Tensor | None = None) -> None:
        """codes = x * inverse + offset, rounded, within low..high."""
        codes = torch.mul(self.x, inverse, out=self.codes)
        if offset is not None:
            codes.add_(offset)
        codes.round_().clamp_(low, high)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the codes, of their squares, of their products with the weights."""
        return self.codes.sum(0), *self.products()

    def products(self) -> tuple[Tensor, Tensor]:
        """The sums of the codes' squares, and of their products with the weights."""
        square = torch.mul(self.codes, self.codes, out=self._work).sum(0)
        return square, torch.mul(self.x, self.codes, out=self._work).sum(0)

    def residual(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of x - scale * codes, and the sum of its squares, which is the squared error."""
        left = torch.addcmul(self.x, self.codes, scale, value=-1, out=self._work)
        return left.sum(0), left.mul_(left).sum(0)

    def error(self, scale: Tensor) -> Tensor:
        """The squared error of scale * codes."""
        left = torch.addcmul(self.x, self.codes, scale, value=-1, out=self._work)
        return left.mul_(left).sum(0)

    def errors(self, scales: Tensor, low: int, high: int) -> Tensor:
        """The table of the squared errors of a table of scales, with the codes low..high that are nearest."""
        table = torch.empty_like(scales)
        for index, (scale, inverse) in enumerate(zip(scales, inverted(scales), strict=True)):
            self.round_to(inverse, low, high)
            table[index] = self.error(scale)
        return table

    def rows(self, block: int, offset: int = 0) -> Tensor:
        """The codes plus `offset`, which makes them 0..255, in rows again: uint8 [n, block]."""
        return self.codes.add_(offset).to(torch.uint8).t().reshape(-1, block)


def pick(errors: Tensor, *tables: Tensor) -> list[Tensor]:
    """The least error of the candidates of each group, and the values that these have in each table: all [groups].

    Arithmetic instead of argmin and comparisons, which torch does ten times more slowly.
    """
    errors = errors.nan_to_num(WORST)
    least = errors.amin(0)
    numbers = torch.arange(1.0, len(errors) + 1, device=errors.device).unsqueeze(1)
    chosen = errors.sub_(least).sign_().neg_().add_(1).mul_(numbers).amax(0, keepdim=True).long() - 1
    return [least, *(table.gather(0, chosen)[0] for table in tables)]


def inverted(values: Tensor) -> Tensor:
    """1 / values, and 0 where that is infinite."""
    return values.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


def stored(scale: Tensor) -> Tensor:
    """The float16 nearest to each scale, as float32; none becomes infinite, and none vanishes that was not 0."""
    return (scale.sign() * scale.abs().clamp_(HALF_STEP, HALF_MAX)).half().float()


def stored_step(step: Tensor) -> Tensor:
    """As `stored`, but a subnormal is never too small: of a step, so many integer multiples must reach the top."""
    half = stored(step).half()
    short = half.float().abs() < step.abs().clamp_max(HALF_MAX) * (1 - HALF_PRECISION)
    return (half.view(torch.int16) + short).view(torch.float16).float()


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
    best = Multiples(*_least([*found, _refitted_multiples(x, found[-1])]))
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
    _, scale, offset = pick(error, scale, offset)
    return scale, offset


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
