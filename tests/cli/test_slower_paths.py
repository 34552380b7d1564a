"""What is slower on this machine than it could be is told by commands once, and not a second time by the log."""

import ctypes
import json
import logging
import subprocess
import sys

import torch

from pixtral_cli import Pixtral
from pixtral_cli.model import free_memory, native_library, slower_paths
from pixtral_cli.model.free_memory import Device
from pixtral_cli.model.native_library import Loaded


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


def test_inspect_says_which_kernels_a_cpu_has_and_run_with_statistics_says_which_ran(call, monkeypatch):
    monkeypatch.setattr(native_library, "loaded", lambda: Loaded(ctypes.CDLL(None), None, "avx2"))
    cpu = json.loads(call("inspect", "tiny", "--json")[1])["devices"][0]
    assert (cpu["name"], cpu["kernels"]) == ("cpu", "avx2") and "kernels: avx2" in call("inspect", "tiny")[1]
    asked = ("run", "--model-path", "tiny", "-p", "hi", "--max-new-tokens", "1")
    assert "kernels avx2 (" in call(*asked, "--stats")[2] and "avx2" not in call(*asked)[2]
    assert json.loads(call(*asked, "--json")[1])["kernels"].startswith("avx2 (")


def test_a_cpu_without_the_compiled_kernels_is_told_of_once(call, monkeypatch):
    monkeypatch.setattr(native_library, "loaded", lambda: Loaded(None, native_library.NOT_COMPILED, "off"))
    monkeypatch.delenv(native_library.SETTING, raising=False)
    for arguments in (
        ("inspect", "tiny"),
        ("run", "--model-path", "tiny", "--quantization-encoding", "q4_0", "-p", "hi"),
    ):
        assert call(*arguments)[2].count("C compiler") == 1


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
