"""What is slower on this machine than it could be is told by commands once, and not a second time by the log."""

import logging
import subprocess
import sys

import torch

from pixtral_cli import Pixtral
from pixtral_cli.model import free_memory, slower_paths
from pixtral_cli.model.free_memory import Device


def test_inspect_tells_of_gpus_only_where_there_are_any(call, monkeypatch):
    monkeypatch.setattr(slower_paths, "sees_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(slower_paths, "notes", lambda device, encodings: ["Triton does not work here."])
    monkeypatch.setattr(free_memory, "devices", lambda: [Device("cpu", None), Device("gpu-0", 2**40)])
    assert call("inspect", "tiny")[2].count("Triton does not work") == 1
    monkeypatch.setattr(free_memory, "devices", lambda: [Device("cpu", None)])
    assert "Triton" not in call("inspect", "tiny")[2]


def test_inspect_says_which_torch_to_install_where_a_gpu_is_there_and_torch_is_for_cpus(call, monkeypatch):
    monkeypatch.setattr(slower_paths, "sees_gpus", lambda: False)
    monkeypatch.setattr(free_memory, "devices", lambda: [Device("cpu", None), Device("gpu-0", 2**40)])
    assert call("inspect", "tiny")[2].count("pip install") == 1


def test_run_tells_what_is_slower_once_and_what_is_logged_beside_it_is_not_shown(call, monkeypatch):
    def load(*arguments, **options):
        logging.getLogger("pixtral_cli.model").warning("It is slower: no compiler")
        return model

    model = Pixtral.load("tiny", devices="cpu")
    monkeypatch.setattr(Pixtral, "load", load)
    monkeypatch.setattr(slower_paths, "notes", lambda device, encodings: ["It is slower: no compiler."])
    code, _, err = call("run", "--model-path", "tiny", "-p", "hi", "--stats", "--max-new-tokens", "1")
    assert code == 0 and err.count("It is slower") == 1
    assert call("run", "--model-path", "tiny", "-p", "hi", "--quiet", "--max-new-tokens", "1")[2] == ""


def test_whoever_uses_the_api_finds_it_in_the_log():
    """Without a handler Python shows warnings on standard error; a command's own way of telling is not in the way."""
    program = (
        "import logging; from pixtral_cli.cli.loading import notes_instead_of_log\n"
        "log = logging.getLogger('pixtral_cli.model')\n"
        "with notes_instead_of_log(): log.warning('inside')\n"
        "log.warning('after')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "after\n"
