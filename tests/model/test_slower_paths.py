"""Which kernels run, and what is slower than it could be, is told once, in a sentence, wherever somebody looks."""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from pixtral_cli import Pixtral
from pixtral_cli.model import native_library, slower_paths, triton_support
from pixtral_cli.model.kernels import cuda_packed, native
from pixtral_cli.model.native_library import Loaded

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def broken(monkeypatch):
    """A card on which neither Triton nor NVRTC works."""
    monkeypatch.setattr(triton_support, "available", lambda device: False)
    monkeypatch.setattr(triton_support, "why_not", lambda: "RuntimeError: Failed to find C compiler")
    monkeypatch.setattr(cuda_packed, "why_not", lambda encoding, device: f"no NVRTC for {encoding}.\nline 1: error")


@pytest.fixture
def whole(monkeypatch):
    monkeypatch.setattr(triton_support, "available", lambda device: True)
    monkeypatch.setattr(cuda_packed, "why_not", lambda encoding, device: None)


def test_a_cpu_where_the_compiled_kernels_run_is_told_by_their_instructions_and_threads(broken, monkeypatch):
    monkeypatch.setattr(native_library, "loaded", lambda: Loaded(ctypes.CDLL(None), None, "avx2"))
    monkeypatch.setattr(native, "threads", lambda: 3)
    assert slower_paths.kernels(CPU) == "avx2 (3 threads)" == Pixtral.load("tiny", devices="cpu").kernels
    assert slower_paths.notes(CPU, ["q4_k"]) == []


def test_where_they_are_missing_packed_weights_are_told_to_be_slow_and_what_to_do(monkeypatch):
    monkeypatch.delenv(native_library.SETTING, raising=False)
    monkeypatch.setattr(native_library, "FOLDER", Path("/nowhere"))
    monkeypatch.setattr(native_library, "loaded", native_library.loaded.__wrapped__)
    (note,) = slower_paths.notes(CPU, ["bfloat16", "q4_k"])
    assert "slower" in note and "C compiler" in note and slower_paths.notes(CPU, ["bfloat16"]) == []
    assert Pixtral.load("tiny", devices="cpu", quantization_encoding="q4_0").notes[-1] == note
    assert slower_paths.kernels(CPU).startswith("torch's")


@pytest.mark.parametrize("wanted", ["off", "OFF"])
def test_who_switched_them_off_is_not_told_to_install_them(monkeypatch, wanted):
    monkeypatch.setenv(native_library.SETTING, wanted)
    monkeypatch.setattr(native_library, "loaded", native_library.loaded.__wrapped__)
    assert slower_paths.notes(CPU, ["q4_k"]) == [] and native_library.SETTING in slower_paths.kernels(CPU)


@pytest.mark.parametrize("wanted", ["sse9", "avx512bf16"])
def test_instructions_that_cannot_be_had_are_named(monkeypatch, wanted):
    class Library:
        pixtral_best_instructions = staticmethod(lambda: native_library.INSTRUCTIONS.index("avx2"))

    monkeypatch.setenv(native_library.SETTING, wanted)
    monkeypatch.setattr(native_library, "loaded", native_library.loaded.__wrapped__)
    monkeypatch.setattr(native_library.ctypes, "CDLL", lambda path: Library)
    monkeypatch.setattr(native_library.Path, "exists", lambda path: True)
    (note,) = native_library.notes()
    assert wanted in note and "avx2" in note and not native_library.available()


def test_a_library_that_cannot_be_loaded_says_why(monkeypatch, tmp_path):
    (tmp_path / f"_native{EXTENSION_SUFFIXES[0]}").write_text("no library")
    monkeypatch.delenv(native_library.SETTING, raising=False)
    monkeypatch.setattr(native_library, "FOLDER", tmp_path)
    monkeypatch.setattr(native_library, "loaded", native_library.loaded.__wrapped__)
    (note,) = native_library.notes()
    assert "cannot be loaded" in note and EXTENSION_SUFFIXES[0] in note


def test_where_all_works_nothing_is_told(whole):
    assert slower_paths.notes(CARD, ["q4_k", "nf4", "bfloat16"]) == []


def test_each_path_that_fails_is_one_sentence_with_its_reason(broken):
    (triton,) = slower_paths.notes(CARD, ["bfloat16"])
    assert "Triton" in triton and "C compiler" in triton and triton.endswith(".")
    assert slower_paths.notes(CARD, {"q6_k", "q4_k", "bfloat16"})[0] == triton
    packed = slower_paths.notes(CARD, {"q6_k", "q4_k"})[1]
    assert "q4_k, q6_k" in packed and packed.endswith("no NVRTC for q4_k.")


def test_the_same_sentence_of_several_cards_is_told_once(broken, monkeypatch):
    monkeypatch.setattr(slower_paths, "sees_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert len(slower_paths.notes_of_this_machine()) == 2
