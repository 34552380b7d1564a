"""The devices that a test runs on: the CPU always, a GPU where there is one."""

import pytest
import torch

from pixtral_cli.model.families import read_config
from pixtral_cli.model.load import load
from pixtral_cli.model.placement import place
from weights_cache import checkpoint
from weights_cache.encodings import ENCODINGS

CPU = torch.device("cpu")
GPU = pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)
DEVICES = [CPU, GPU]


def loaded(folder, device=CPU, encoding="float32"):
    """The checkpoint's model on a device."""
    opened = checkpoint.open(folder)
    return load(opened, read_config(opened.config), place(opened.tensors, ENCODINGS[encoding]), device)
