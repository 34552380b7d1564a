"""Weights in groups, rounded to the codes of one scale after another, with the sums that judge a scale.

Knows no encoding. Everything stands upright: float32 [weights of a group, groups], so that torch works along the
groups, many at once. A value per group is [groups], and one per candidate and group is a table [candidates, groups].
"""

from functools import cached_property

import torch
from torch import Tensor

HALF_MAX = 65504.0
WORST = torch.finfo(torch.float32).max
HALF_STEP = 2.0**-24  # the smallest float16
HALF_PRECISION = 2.0**-11  # relative, where float16 is not subnormal


class Scratch:
    """Arrays that are used again for the next chunk: fresh pages cost more than the arithmetic in them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._arrays: dict[str, Tensor] = {}

    def array(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The array `name`, with whatever was last in it; a new one when the shape has changed."""
        if name not in self._arrays or self._arrays[name].shape != shape:
            self._arrays[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return self._arrays[name]


class Groups:
    """`x` [size, groups]: the weights; `codes`, of the same shape: what the last `round_to` made of them."""

    def __init__(self, weights: Tensor, scratch: Scratch, size: int, low: float, high: float) -> None:
        """float32 rows [n, block], contiguous, used up; those outside low..high, out of reach, are taken for these."""
        upright = weights.view(-1, size).t()
        self.x, self.codes = (scratch.array(name, *upright.shape) for name in ("x", "codes"))
        self.x.copy_(upright).clamp_(low, high)
        self._work = weights.view(upright.shape)

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
