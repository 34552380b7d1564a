"""Odd places and files: each is a sentence that says what is there, and never a traceback."""

import os
import shutil

import pytest
from support.hub_cache import HF, put, weights
from support.processes import PROGRAM, run_process

WITHOUT_RIGHTS = ["setpriv", "--inh-caps=-dac_override,-dac_read_search"]
WITHOUT_RIGHTS += ["--bounding-set=-dac_override,-dac_read_search"]


@pytest.fixture
def as_a_user(tmp_path):
    """Run `pixtral` where permissions count, even when the tests are run by root."""
    own = {name: os.environ[name] for name in ("PIXTRAL_CACHE", "HF_HOME")}
    if os.geteuid():
        command = PROGRAM
    elif shutil.which("setpriv"):
        command = [*WITHOUT_RIGHTS, *PROGRAM]
    else:
        pytest.skip("root may read everything")
    locked = []

    def run(*arguments, lock):
        lock.chmod(0)
        locked.append(lock)
        done = run_process(command, arguments, env=own | {"HF_HUB_OFFLINE": "1"})
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    yield run
    for path in locked:
        path.chmod(0o700)


@pytest.mark.parametrize(
    "command", [["inspect"], ["run", "-p", "hi", "--model-path"], ["tokenize", "-p", "hi", "--model-path"]]
)
@pytest.mark.parametrize("what", ["", "config.json"])
def test_what_may_not_be_read_is_named(caches, as_a_user, tmp_path, command, what):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in (HF | {"model.safetensors": weights()}).items():
        (folder / name).write_bytes(content)
    code, out, err = as_a_user(*command, str(folder), lock=folder / what)
    assert (code, out) == (1, "") and f"{folder / what} cannot be read (Permission denied)" in err, err
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize(
    "what", ["own", "own/models", "home/hub/models--a--locked", "home/hub/models--a--locked/blobs"]
)
def test_the_cache_is_listed_without_what_may_not_be_read(caches, as_a_user, tmp_path, what):
    put(caches, "a/locked", HF | {"model.safetensors": weights()})
    put(caches, "a/open", HF | {"model.safetensors": weights()})
    (tmp_path / "own/models").mkdir(parents=True)
    for command in (["list"], ["verify"], ["prune", "--older-than", "1d", "--yes"]):
        code, out, err = as_a_user("cache", *command, lock=tmp_path / what)
        assert code == 0 and (command[0] == "prune" or "a/open" in out), err


@pytest.mark.parametrize("name", ["m.gguf", "q4/m.gguf", "q4/m-00002-of-00002.gguf", "q4/model.safetensors"])
def test_a_file_that_is_not_there_is_no_name_on_the_hub(caches, refused, name):
    err = refused("run", "--model-path", name, "-p", "hi")
    assert "no such file" in err and "HF_HUB_OFFLINE" not in err


def test_a_file_of_another_kind_is_said_to_be_what_it_is(caches, call, tmp_path):
    plain, gguf, export = tmp_path / "a.safetensors", tmp_path / "noname", tmp_path / "tiny.q4"
    plain.write_bytes(weights())
    gguf.write_bytes(b"GGUF" + bytes(100))
    assert call("export", "tiny", str(export))[0] == 0
    for command in (["verify"], ["inspect"], ["run", "-p", "hi", "--serialized-model-path"]):
        assert "it is no serialized model" in call(*command, str(plain))[2]
        told = "GGUF version 0" if command == ["inspect"] else "it is a GGUF file"  # which it looks at, named or not
        assert told in call(*command, str(gguf))[2]
    assert "--serialized-model-path" in call("run", "-p", "hi", "--model-path", str(export))[2]


def test_weights_that_are_not_there_are_named_before_the_hub_is_asked_for_the_model(refused, monkeypatch):
    monkeypatch.setattr("weights_cache.hub.fetch", None)
    err = refused("run", "-p", "hi", "--model-path", "owner/name", "--weight-path", "no/such.safetensors")
    assert "no/such.safetensors does not exist" in err
