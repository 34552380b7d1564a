"""`--devices`: what people write and what it means."""

import pytest

from pixtral_cli.devices import Devices, default, parse
from pixtral_cli.errors import DeviceError


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("cpu", Devices("cpu")),
        ("gpu", Devices("gpu", (0,))),
        ("gpu-0", Devices("gpu", (0,))),
        ("gpu-2", Devices("gpu", (2,))),
        ("gpu-0,gpu-1", Devices("gpu", (0, 1))),
        ("gpu:0,1", Devices("gpu", (0, 1))),
        ("gpu:3", Devices("gpu", (3,))),
        ("gpu:all", Devices("gpu", None)),
        (" GPU-0, gpu-1 ", Devices("gpu", (0, 1))),
    ],
)
def test_every_spelling_means_its_devices(text, meaning):
    assert parse(text) == meaning


@pytest.mark.parametrize(
    "text",
    ["", "cuda", "cuda:0", "gpu-", "gpu:", "gpu-0,1", "gpu:0,gpu-1", "cpu,gpu-0", "gpu--1", "gpu-0,", "gpu-0,gpu-0"],
)
def test_anything_else_is_refused_with_a_way_out(text):
    with pytest.raises(DeviceError) as caught:
        parse(text)
    assert repr(text) in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(
    ("text", "gpus_here", "name"),
    [("cpu", 0, "cpu"), ("cpu", 4, "cpu"), ("gpu", 1, "cuda:0"), ("gpu-1", 2, "cuda:1"), ("gpu:all", 1, "cuda:0")],
)
def test_one_device_gets_its_torch_name(text, gpus_here, name):
    assert parse(text).torch_name(gpus_here) == name


@pytest.mark.parametrize(
    ("text", "gpus_here", "said"),
    [
        ("gpu", 0, "no GPU"),
        ("gpu:all", 0, "no GPU"),
        ("gpu-1", 1, "no gpu-1; it has gpu-0"),
        ("gpu-0,gpu-5", 4, "no gpu-5; it has gpu-0 to gpu-3"),
        ("gpu:all", 2, "does not work yet"),
        ("gpu-0,gpu-1", 2, "does not work yet"),
    ],
)
def test_a_device_that_is_not_there_is_named(text, gpus_here, said):
    with pytest.raises(DeviceError, match=said) as caught:
        parse(text).torch_name(gpus_here)
    assert caught.value.hint


def test_without_a_wish_the_first_gpu_is_taken_and_else_the_cpu():
    assert (default(0), default(1), default(8)) == ("cpu", "cuda:0", "cuda:0")
