"""Promises about single large files: resumed across runs, checked, whole or not there, whatever kills the process."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from weights_cache import cache
from weights_cache.cache import CachedRepo
from weights_cache.errors import DownloadFailed
from weights_cache.hub import fetch

REPO = "acme/large"
NAME = "model.safetensors"
SIDE = {"config.json": b"{}", "tokenizer.json": b'{"model": {}}'}
BYTES = 600_000
real_sleep = time.sleep


@pytest.fixture
def repo(hub, monkeypatch: pytest.MonkeyPatch):
    hub.repos[REPO] = SIDE | {NAME: save({"a": np.frombuffer(random.Random(0).randbytes(BYTES), np.uint8)})}
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    return hub


def content(repo) -> bytes:
    return repo.repos[REPO][NAME]


def partial(repo) -> Path:
    from support import fake_hub

    return CachedRepo(REPO).partial_blob(fake_hub.sha256(content(repo)))


def on_weights(repo, *faults: dict) -> None:
    """The first requests for the weights' bytes go wrong in these ways, one each; a status at the end stays."""
    from support import fake_hub

    left = list(faults)

    def decide(method: str, path: str):
        if method == "GET" and path.endswith(NAME) and left:
            return fake_hub.Fault(**(left.pop(0) if len(left) > 1 or "status" not in left[0] else left[0]))
        return None

    repo.fault = decide


def ranges(repo) -> list[str | None]:
    return [h.get("range") for method, path, h in repo.requests if method == "GET" and path.endswith(NAME)]


def broken_at(repo, nbytes: int) -> None:
    """A run that ended after so many bytes of the weights."""
    on_weights(repo, {"cut": nbytes}, {"status": 418})
    with pytest.raises(DownloadFailed):
        fetch(REPO)
    repo.fault = lambda method, path: None
    repo.requests.clear()


def test_the_next_run_goes_on_inside_the_file_where_the_last_one_broke_off(repo):
    broken_at(repo, 400_000)
    assert partial(repo).stat().st_size == 400_000
    seen = []
    folder = fetch(REPO, progress=lambda label, done, total: seen.append(done))
    assert ranges(repo) == ["bytes=400000-"] and (folder / NAME).read_bytes() == content(repo)
    assert not partial(repo).exists() and min(seen) >= 400_000 and seen[-1] == len(content(repo))


def test_the_room_that_is_needed_is_that_of_the_rest(repo, monkeypatch: pytest.MonkeyPatch):
    from types import SimpleNamespace

    broken_at(repo, 400_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=250_000))
    assert fetch(REPO)


@pytest.mark.parametrize("junk", [b"x" * 1000, b"x" * 10**6, b""])
def test_a_wrong_beginning_is_noticed_and_all_of_it_fetched_anew(repo, junk: bytes):
    partial(repo).parent.mkdir(parents=True)
    partial(repo).write_bytes(junk)
    assert (fetch(REPO) / NAME).read_bytes() == content(repo)


def test_a_beginning_that_is_already_everything_needs_no_bytes(repo):
    partial(repo).parent.mkdir(parents=True)
    partial(repo).write_bytes(content(repo))
    assert (fetch(REPO) / NAME).read_bytes() == content(repo) and ranges(repo) == []


@pytest.mark.parametrize("name", [NAME, "tokenizer.json", "config.json"])
def test_a_file_with_one_altered_byte_is_refused_and_leaves_nothing(repo, name: str):
    from support import fake_hub

    repo.fault = lambda method, path: fake_hub.Fault(alter=True) if path.endswith(name) else None
    for _ in range(2):
        with pytest.raises(DownloadFailed, match=f"{name} arrived altered"):
            fetch(REPO)
        assert cache.find(REPO, "main", weights=True) is None and not partial(repo).exists()
    repo.fault = lambda method, path: None
    assert (fetch(REPO) / name).read_bytes() == repo.repos[REPO][name]


@pytest.mark.parametrize("listed", [lambda c: c + b"more", lambda c: c[:-10]])
def test_a_file_of_another_length_than_the_listing_says_is_refused(repo, listed):
    repo.listed = {NAME: listed(content(repo))}
    for _ in range(2):
        with pytest.raises(DownloadFailed, match=NAME):
            fetch(REPO)
        assert cache.find(REPO, "main", weights=True) is None


def test_a_server_that_ignores_ranges_gives_a_whole_file_all_the_same(repo):
    broken_at(repo, 400_000)
    repo.ranges = False
    assert (fetch(REPO) / NAME).read_bytes() == content(repo)


def test_a_slow_and_often_cut_connection_gets_there(repo):
    on_weights(repo, *[{"cut": 100_000}] * 5, {"drip": 0.001})
    assert (fetch(REPO) / NAME).read_bytes() == content(repo)
    assert ranges(repo) == [None] + [f"bytes={n}00000-" for n in range(1, 6)]


def start_fetch(repo) -> subprocess.Popen:
    root = str(Path(__file__).parents[2])
    code = (
        f"import sys; sys.path.insert(0, {root!r}); import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE=10_000"
        f"\nfrom weights_cache.hub import fetch; print(fetch({REPO!r}))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        real_sleep(0.002)


def test_a_process_killed_at_any_moment_leaves_nothing_half_that_is_used(repo):
    from support import fake_hub

    repo.fault = lambda method, path: fake_hub.Fault(drip=0.004) if path.endswith(NAME) else None
    for at_least in (0, 100_000, 350_000):
        process = start_fetch(repo)
        wait_for(lambda enough=at_least: partial(repo).is_file() and partial(repo).stat().st_size >= enough)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert cache.find(REPO, "main", weights=True) is None
    repo.fault = lambda method, path: None
    assert (fetch(REPO) / NAME).read_bytes() == content(repo)
    asked = [int(each.removeprefix("bytes=").rstrip("-")) for each in ranges(repo) if each]
    assert asked == sorted(asked) and asked[-1] >= 350_000


def test_two_processes_at_once_share_one_transfer(repo):
    from support import fake_hub

    repo.fault = lambda method, path: fake_hub.Fault(drip=0.003) if path.endswith(NAME) else None
    processes = [start_fetch(repo) for _ in range(2)]
    printed = {process.communicate(timeout=30)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(printed) == 1
    assert ranges(repo) == [None]
    assert (fetch(REPO) / NAME).read_bytes() == content(repo)


def test_a_shared_content_is_linked_and_not_fetched_again(repo):
    fetch(REPO)
    repo.repos[REPO]["config.json"] = b'{"newer": 1}'
    repo.requests.clear()
    assert (fetch(REPO, force=False) / NAME).is_file() and ranges(repo) == []
    assert (fetch(f"{REPO}@v1") / NAME).is_file() and ranges(repo) == []
