"""What every test shares: no network, an empty cache, quiet oracles, one thread, GPU tests only where there is one."""

import os
import shutil
import tempfile

os.environ["PIXTRAL_CACHE"] = tempfile.mkdtemp(prefix="pixtral-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are tiny: more threads only wait for each other
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest

from pixtral_cli import process_environment

process_environment.prepare()


def pytest_collection_modifyitems(items):
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_unconfigure():
    shutil.rmtree(os.environ["PIXTRAL_CACHE"], ignore_errors=True)
