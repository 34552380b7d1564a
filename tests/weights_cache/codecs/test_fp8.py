"""Weights put into FP8: each code is the nearest that there is, by trying all of them."""

import pytest
import torch

from weights_cache.codecs import fp8
from weights_cache.errors import NotEncodable

CODES = torch.arange(256).to(torch.uint8)
CODES = CODES[(CODES & 127) != 127]
VALUES = CODES.view(torch.float8_e4m3fn).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_nearest_and_the_largest_weight_of_a_row_is_448_of_its_scale(dtype):
    weights = torch.randn(17, 300, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)
    found = fp8.encode(weights)
    assert torch.equal(found.scales, weights.float().abs().amax(1, keepdim=True) / 448)
    possible = found.scales.double()[:, :, None] * VALUES
    nearest = (weights.double()[..., None] - possible).abs().amin(2)
    error = (weights.double() - found.decoded().double()).abs()
    assert (error <= nearest + weights.double().abs() * 2**-22).all()


def test_what_was_in_fp8_by_rows_stays_so():
    codes = CODES[torch.randint(0, len(CODES), (5, 64), generator=torch.Generator().manual_seed(0))]
    codes[:, 0] = 0x7E  # 448
    before = fp8.FP8(codes, torch.tensor([[1.0], [0.5], [3.0], [2.0**-20], [1e-3]]))
    after = fp8.encode(before.decoded())
    assert torch.equal(after.scales, before.scales)
    assert torch.equal(after.decoded(), before.decoded())


def test_rows_of_nothing_and_of_almost_nothing_have_a_scale():
    found = fp8.encode(torch.tensor([[0.0, -0.0], [1e-45, 0.0], [3e-38, 1e-38]]))
    assert (found.scales > 0).all() and found.decoded().isfinite().all()
    assert torch.equal(found.decoded()[0], torch.zeros(2))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused(value):
    weights = torch.ones(3, 64)
    weights[2, 5] = value
    with pytest.raises(NotEncodable, match="infinite or not a number"):
        fp8.encode(weights)
