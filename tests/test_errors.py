"""Which errors mean that memory ran out: torch has one for GPUs, and a plain RuntimeError for the CPU."""

import pytest
import torch

from pixtral_cli.errors import is_out_of_memory


def raised_by(function):
    try:
        function()
    except (MemoryError, RuntimeError, KeyError, ValueError) as error:
        return error
    raise AssertionError("it succeeded")


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: torch.empty(2**50), lambda: bytearray(2**60)],
    ids=["torch", "torch, of floats", "Python"],
)
def test_an_allocation_that_failed_is_known(allocate):
    assert is_out_of_memory(raised_by(allocate))


def test_torchs_error_of_a_gpu_is_known():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."))


@pytest.mark.parametrize(
    "fail",
    [lambda: torch.ones(2) @ torch.ones(3), lambda: {}["memory"], lambda: int("out of memory")],
    ids=["shapes", "a key", "its words in another error"],
)
def test_another_failure_is_not_taken_for_it(fail):
    assert not is_out_of_memory(raised_by(fail))
