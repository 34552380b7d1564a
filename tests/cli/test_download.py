"""`pixtral download`: prints where the model lies, and says why it could not be fetched."""

import json
from pathlib import Path

from support.hub_cache import COMMIT, HF, put, weights


def test_the_built_in_model_is_already_here(call):
    code, out, _ = call("download", "tiny")
    assert code == 0 and (Path(out.strip()) / "config.json").is_file()


def test_a_cached_model_prints_its_folder_and_nothing_else(caches, call):
    root = put(caches, "a/m", HF | {"model.safetensors": weights()})
    folder = str(root / "snapshots" / COMMIT)
    assert call("download", "a/m") == (0, f"{folder}\n", "")
    assert json.loads(call("download", "a/m", "--json")[1]) == {"model": "a/m", "path": folder}


def test_what_is_not_here_and_may_not_be_fetched_is_a_sentence(caches, refused):
    assert "HF_HUB_OFFLINE" in refused("download", "a/absent")


def test_a_name_that_is_none_is_a_sentence(caches, refused):
    assert "'no such name'" in refused("download", "no such name")
