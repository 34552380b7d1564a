"""What is slower on a card than it could be is told once, in a sentence, wherever somebody looks."""

import pytest
import torch

from pixtral_cli import Pixtral
from pixtral_cli.model import slower_paths, triton_support
from pixtral_cli.model.kernels import cuda_packed

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


def test_a_cpu_has_no_path_to_tell_of(broken):
    assert slower_paths.notes(CPU, ["q4_k"]) == [] and Pixtral.load("tiny", devices="cpu").notes == []


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
