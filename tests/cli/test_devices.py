"""`--devices`: what people write and what it means."""

import tomllib
from pathlib import Path

import pytest
import torch

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
        ("gpu", 0, "torch finds no GPU"),
        ("gpu:all", 0, "torch finds no GPU"),
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


def test_a_torch_for_cpus_only_says_which_to_install():
    with pytest.raises(DeviceError, match="built for CPUs only") as caught:
        parse("gpu").torch_name(0, built_for_gpus=False)
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    wanted = next(each for each in project["dependencies"] if each.startswith("torch"))
    assert f'"{wanted}" --index-url https://download.pytorch.org/whl/cu130' in caught.value.hint
    assert parse("cpu").torch_name(0, built_for_gpus=False) == "cpu"


def test_a_torch_for_gpus_that_sees_none_says_where_to_look():
    with pytest.raises(DeviceError) as caught:
        parse("gpu").torch_name(0)
    assert "nvidia-smi" in caught.value.hint and "--devices cpu" in caught.value.hint


def test_a_gpu_that_cannot_be_had_ends_the_command_with_a_sentence_and_the_next_thing_to_do(call):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, out, err = call("run", "--model-path", "tiny", "--devices", "gpu", "-p", "hi")
    sentence, hint = err.splitlines()
    assert (code, out) == (1, "") and sentence.startswith("pixtral: error: ")
    assert ("pip install" in hint) == (torch.version.cuda is None)


def test_without_a_wish_the_first_gpu_is_taken_and_else_the_cpu():
    assert (default(0), default(1), default(8)) == ("cpu", "cuda:0", "cuda:0")
