"""Promises about the way to the Hub: proxies, mirrors with a path, what does not go through them, and tokens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weights_cache.errors import DownloadFailed, TokenUnusable, Unreadable
from weights_cache.hub import fetch, fetch_headers

REPO = "acme/pixtral-small"


def fetch_elsewhere(**environment: str) -> subprocess.CompletedProcess:
    """In a process of its own, since the library reads the environment once."""
    code = f"from weights_cache.hub import fetch; print(fetch({REPO!r}))"
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith(("_proxy", "hub_offline"))}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=root, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_every_byte_goes_through_the_proxy(hub, variable: str):
    done = fetch_elsewhere(HF_ENDPOINT="http://hub.test", **{variable: hub.url})
    assert done.returncode == 0, done.stderr
    assert len(hub.fetched()) == 11 and all(each.startswith("http://hub.test/") for each in hub.targets)


def test_a_secure_endpoint_is_reached_through_the_proxy_for_those(hub):
    done = fetch_elsewhere(HF_ENDPOINT="https://hub.test", HTTPS_PROXY=hub.url, HTTP_PROXY="http://127.0.0.1:1")
    assert done.returncode == 1 and "DownloadFailed" in done.stderr and "hub.test" in done.stderr
    assert set(hub.targets) == {"hub.test:443"}


def test_what_no_proxy_names_is_asked_directly(hub):
    done = fetch_elsewhere(HTTP_PROXY="http://127.0.0.1:1", NO_PROXY="127.0.0.1,localhost")
    assert done.returncode == 0, done.stderr
    assert len(hub.fetched()) == 11 and all(each.startswith("/") for each in hub.targets)


def test_a_proxy_that_is_not_there_is_a_sentence(hub):
    done = fetch_elsewhere(HF_ENDPOINT="http://hub.test", HTTP_PROXY="http://127.0.0.1:1")
    assert "DownloadFailed" in done.stderr and "cannot be reached" in done.stderr and hub.targets == []


@pytest.mark.parametrize("ending", ["", "/", "//"])
@pytest.mark.parametrize("prefix", ["", "/mirrors/hf"])
def test_a_mirror_may_have_a_path_and_a_slash_at_its_end(hub, monkeypatch, tmp_path: Path, prefix: str, ending: str):
    hub.prefix = prefix
    monkeypatch.setenv("HF_ENDPOINT", hub.url + prefix + ending)
    assert fetch_headers(REPO, tmp_path / "skeleton") and len(list(fetch(REPO).iterdir())) == 11
    assert all(each.startswith(f"{prefix}/") and "//" not in each for each in hub.targets)


def test_a_mirror_without_its_path_is_a_sentence(hub):
    hub.prefix = "/mirrors/hf"
    with pytest.raises(DownloadFailed, match="404"):
        fetch(REPO)


@pytest.mark.parametrize("name", ["{outside}/model.gguf", "../../../../../outside/model.gguf", "a/../../model.gguf"])
@pytest.mark.parametrize("get", [fetch, lambda repo: fetch_headers(repo, Path(repo).absolute().parent)])
def test_a_mirror_that_lists_a_file_elsewhere_writes_none_there(hub, monkeypatch, tmp_path: Path, get, name: str):
    monkeypatch.chdir(tmp_path)
    hub.repos["acme/evil"] = {name.format(outside=tmp_path / "outside"): b"GGUF" + bytes(100)}
    with pytest.raises(DownloadFailed, match="no place for a file"):
        get("acme/evil")
    assert [path for path in tmp_path.rglob("*") if "model.gguf" in path.name or "outside" in path.name] == []
    assert hub.fetched() == []


@pytest.mark.parametrize("hash", ["FakeHub.commit", "sha256"])
def test_a_mirror_that_gives_a_path_for_a_hash_is_not_believed(hub, monkeypatch, hash: str):
    monkeypatch.setattr(f"support.fake_hub.{hash}", lambda *of: "outside")
    with pytest.raises(DownloadFailed):
        fetch(REPO)
    assert hub.fetched() == []


# --- a token that no request can carry


@pytest.mark.parametrize("token", ["hf_ключ", "hf_“quoted”", "hf_a\x07b", "hf_a\tb", "hf_\udc80"])
@pytest.mark.parametrize("kept", ["environment", "file"])
def test_a_token_with_strange_characters_is_a_sentence_and_never_shown(
    hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, kept: str
):
    path = tmp_path / "token"
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(path))
    if kept == "environment":
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        path.write_bytes(token.encode("utf-8", "surrogateescape"))
    with pytest.raises(TokenUnusable) as refused:
        fetch(REPO)
    error = refused.value
    assert ("HF_TOKEN" if kept == "environment" else str(path)) in str(error)
    assert token not in str(error) + error.hint and hub.requests == []


def test_a_newline_at_the_end_of_a_token_is_no_matter(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "token").write_text("hf_secret\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    fetch(REPO)
    assert {headers.get("authorization") for _, _, headers in hub.requests} == {"Bearer hf_secret"}


def test_a_token_file_that_cannot_be_read_is_named(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path))
    with pytest.raises(Unreadable, match=re.escape(str(tmp_path))):
        fetch(REPO)
    assert hub.requests == []
