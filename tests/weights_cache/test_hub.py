"""Promises of fetching from the Hub, against a server on localhost that behaves and misbehaves as the real one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from weights_cache import cache, checkpoint
from weights_cache.cache import CachedRepo
from weights_cache.errors import (
    DiskFull,
    DownloadFailed,
    Gated,
    ModelNotFound,
    Offline,
    PickleRefused,
    WeightsError,
    WeightsNotFound,
)
from weights_cache.hub import fetch

REPO = "acme/pixtral-small"
FIRST, SECOND = (f"model-{n:05d}-of-00002.safetensors" for n in (1, 2))
INDEX = "model.safetensors.index.json"
SMALL = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tekken.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
}
WHOLE = SMALL | {INDEX, FIRST, SECOND}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def failing(hub, when: Callable[[str, str], bool], times: int = 10**6, **fault: object) -> None:
    """From now on the server goes wrong for requests that `when` picks by (method, path), so many times."""
    from support import fake_hub

    left = [times]

    def decide(method: str, path: str):
        if when(method, path) and left[0] > 0:
            left[0] -= 1
            return fake_hub.Fault(**fault)
        return None

    hub.fault = decide


def body_of(file: str) -> Callable[[str, str], bool]:
    return lambda method, path: method == "GET" and path.endswith(file)


def failure(kind: type[WeightsError], name: str = REPO, **options: object) -> WeightsError:
    """The error of fetching `name`: of this kind, one sentence, with a next thing to do."""
    with pytest.raises(kind) as caught:
        fetch(name, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".") and "http2" not in str(caught.value)
    assert caught.value.hint
    return caught.value


# --- what is fetched


def test_a_local_folder_or_file_is_returned_as_it_is_and_nothing_is_asked(hub, tmp_path: Path):
    (tmp_path / "file.gguf").touch()
    assert fetch(str(tmp_path)) == tmp_path
    assert fetch(str(tmp_path / "file.gguf"), force=True) == tmp_path / "file.gguf"
    assert hub.requests == []


def test_one_format_and_only_the_files_needed_are_fetched(hub):
    folder = fetch(REPO)
    assert names(folder) == WHOLE
    assert sorted(hub.fetched()) == sorted(WHOLE)
    assert checkpoint.open(folder).tensor("lm_head.weight").shape == (300, 100)


def test_without_weights_only_the_small_files_are_fetched_and_the_rest_later(hub):
    assert names(fetch(REPO, weights=False)) == SMALL
    hub.requests.clear()
    assert names(fetch(REPO)) == WHOLE
    assert set(hub.fetched()) == WHOLE - SMALL


def test_a_single_file_is_preferred_over_an_index(hub):
    hub.repos[REPO]["model.safetensors"] = hub.repos[REPO][FIRST]
    assert names(fetch(REPO)) == SMALL | {"model.safetensors"}


@pytest.mark.parametrize("revision", ["v1", "commit"])
def test_a_revision_is_named_after_an_at_sign(hub, revision: str):
    revision = hub.commit(REPO) if revision == "commit" else revision
    folder = fetch(f"{REPO}@{revision}")
    assert names(folder) == WHOLE and folder.name == hub.commit(REPO)
    hub.requests.clear()
    assert fetch(f"{REPO}@{revision}") == folder
    assert hub.requests == []


def test_the_token_is_sent_and_kept_out_of_what_is_said(hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(REPO)
    assert {headers.get("authorization") for _, _, headers in hub.requests} == {"Bearer hf_secret"}
    failing(hub, lambda method, path: True, status=403)
    assert "hf_secret" not in str(failure(Gated, force=True))


# --- the cache


@pytest.mark.parametrize("weights", [False, True])
def test_what_is_cached_completely_needs_no_request(hub, monkeypatch: pytest.MonkeyPatch, weights: bool):
    folder = fetch(REPO)
    hub.requests.clear()
    assert fetch(REPO, weights=weights) == folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(REPO, weights=weights) == folder
    assert hub.requests == []


def test_a_cached_model_is_found_without_importing_the_hubs_library(hub):
    folder = fetch(REPO)
    code = f"import sys; from weights_cache.hub import fetch; print(fetch({REPO!r}), 'huggingface_hub' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], env=os.environ
    )
    assert done.stdout.strip() == f"{folder} False", done.stderr


def test_what_the_hubs_own_library_downloaded_is_used(hub):
    from huggingface_hub import hf_hub_download

    for name in sorted(WHOLE):
        path = hf_hub_download(REPO, name, cache_dir=cache.hub_cache_folder(), endpoint=hub.url)
    hub.requests.clear()
    assert fetch(REPO) == Path(path).parent
    assert hub.requests == []


def test_what_was_downloaded_here_is_found_by_the_hubs_own_library(hub):
    from huggingface_hub import hf_hub_download

    folder = fetch(REPO)
    found = hf_hub_download(REPO, SECOND, cache_dir=cache.hub_cache_folder(), local_files_only=True)
    assert Path(found) == folder / SECOND


@pytest.mark.parametrize("absent", [FIRST, SECOND, "config.json"])
def test_a_snapshot_that_lacks_a_file_is_completed_with_that_file_alone(hub, absent: str):
    folder = fetch(REPO)
    target = (folder / absent).resolve()
    (folder / absent).unlink()
    target.unlink()
    hub.requests.clear()
    assert names(fetch(REPO)) == WHOLE
    assert hub.fetched() == [absent]


def test_a_shard_of_the_wrong_length_in_the_cache_is_fetched_again(hub):
    folder = fetch(REPO)
    blob = (folder / SECOND).resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    hub.requests.clear()
    assert checkpoint.open(fetch(REPO)).tensor("lm_head.weight").shape == (300, 100)
    assert hub.fetched() == [SECOND]


def test_a_listing_left_by_the_library_tells_that_a_side_file_is_missing(hub):
    folder = fetch(REPO)
    listing = CachedRepo(REPO).folder / "trees" / f"{folder.name}.json"
    listing.parent.mkdir()
    listing.write_text('{"format_version": 1, "files": {"chat_template.jinja": {}, "config.json": {}}}')
    hub.requests.clear()
    fetch(REPO)
    assert hub.requests == []
    (folder / "chat_template.jinja").unlink()
    assert names(fetch(REPO)) == WHOLE


def test_force_fetches_everything_anew(hub):
    fetch(REPO)
    hub.requests.clear()
    fetch(REPO, force=True)
    assert set(hub.fetched()) == WHOLE


def test_force_moves_to_the_hubs_newer_version_and_plain_fetch_stays(hub):
    old = fetch(REPO)
    hub.repos[REPO]["config.json"] = b'{"newer": true}'
    assert fetch(REPO) == old
    new = fetch(REPO, force=True)
    assert new != old and checkpoint.open(new).config == {"newer": True}
    assert fetch(REPO) == new


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HUB_CACHE": "/x/c", "HF_HOME": "/x/h"}, "/x/c"),
        ({"HF_HOME": "/x/h", "XDG_CACHE_HOME": "/x/x"}, "/x/h/hub"),
        ({"XDG_CACHE_HOME": "/x/x"}, "/x/x/huggingface/hub"),
        ({"HOME": "/x/me"}, "/x/me/.cache/huggingface/hub"),
        ({"HOME": "/x/me", "HF_HOME": "~/h"}, "/x/me/h/hub"),
    ],
)
def test_the_cache_folder_is_the_one_that_the_hubs_library_uses(environment: dict[str, str], expected: str):
    code = (
        "from weights_cache import cache; from huggingface_hub import constants as theirs; "
        "print(cache.hub_cache_folder(), theirs.HF_HUB_CACHE)"
    )
    environment = {"PATH": os.environ["PATH"], **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment
    )
    assert done.stdout.split() == [expected, expected], done.stderr


# --- progress


def test_progress_rises_to_the_bytes_of_all_files(hub):
    seen: list[tuple[str, int, int | None]] = []
    fetch(REPO, progress=lambda *event: seen.append(event))
    done = [event[1] for event in seen]
    total = sum(len(hub.repos[REPO][name]) for name in WHOLE - {INDEX, "config.json"})
    assert {event[0] for event in seen} == {REPO}
    assert done == sorted(done) and done[-1] == total
    assert {event[2] for event in seen} == {total}


def test_nothing_is_printed_not_even_by_the_library_when_it_retries(
    hub, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    failing(hub, body_of(FIRST), times=1, cut=50_000)
    fetch(REPO)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.name.startswith("huggingface_hub")] == []


# --- what goes wrong


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/folder",
        "./nothing",
        "~/nothing",
        "a/b/c",
        "nothing",
        "a b/c",
        "a/..b",
        "~nobody-by-this-name/x",
        "x" * 999,
        "a\0b",
    ],
)
def test_what_is_no_folder_and_no_hub_name_is_not_asked_for(hub, name: str):
    assert repr(name) in str(failure(ModelNotFound, name))
    assert hub.requests == []


def test_an_unknown_repository_is_said_to_be_neither_here_nor_there(hub):
    error = failure(ModelNotFound, "acme/unknown")
    assert "acme/unknown" in str(error) and hub.url in str(error) and "HF_TOKEN" in error.hint


def test_an_unknown_revision_is_named(hub):
    assert "no revision 'v9'" in str(failure(ModelNotFound, f"{REPO}@v9"))


@pytest.mark.parametrize("fault", [{"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, {"status": 403}])
@pytest.mark.parametrize("where", ["/api/", "config.json", FIRST])
def test_a_gated_model_gives_the_page_to_visit(hub, fault: dict, where: str):
    failing(hub, lambda method, path: where in path, **fault)
    error = failure(Gated)
    assert error.page == f"{hub.url}/{REPO}" and error.page in error.hint and "HF_TOKEN" in error.hint


def test_a_gated_model_without_a_token_answers_401_and_gives_the_page_too(hub):
    failing(hub, lambda method, path: True, status=401, headers={"X-Error-Code": "GatedRepo"})
    assert failure(Gated).status == 401


def test_a_refused_token_is_said(hub, monkeypatch: pytest.MonkeyPatch):
    headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
    failing(hub, lambda method, path: True, status=401, headers=headers)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    error = failure(DownloadFailed)
    assert "does not accept the token" in str(error) and "HF_TOKEN" in error.hint


def test_who_has_no_token_is_not_told_that_it_was_refused(hub):
    failing(hub, lambda method, path: True, status=401)
    error = failure(DownloadFailed)
    assert "there is none" in str(error) and "HF_TOKEN" in error.hint


def test_what_a_repository_lacks_is_said_once_and_with_what_it_has(hub):
    hub.repos["acme/hf"] = {"config.json": b"{}", "model.safetensors": b"x"}
    assert "--weights-format hf" in failure(WeightsNotFound, "acme/hf", form="gguf").hint
    hub.repos["acme/one"] = {"a.gguf": b"GGUF"}
    error = failure(ModelNotFound, "acme/one:b.gguf")
    assert str(error).startswith("There is no model 'acme/one:b.gguf':") and "a.gguf" in error.hint


@pytest.mark.parametrize("status", [500, 503, 429, 418])
@pytest.mark.parametrize("where", ["/api/", "config.json", FIRST])
def test_a_server_in_trouble_is_reported_with_its_status(hub, status: int, where: str):
    failing(hub, lambda method, path: where in path, status=status)
    assert str(status) in str(failure(DownloadFailed))


def test_a_server_that_is_not_there_is_reported(hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    error = failure(DownloadFailed)
    assert "127.0.0.1:1" in str(error) and "again" in error.hint


@pytest.mark.parametrize("where", ["/api/", FIRST])
def test_a_server_that_does_not_answer_is_given_up(hub, monkeypatch: pytest.MonkeyPatch, where: str):
    monkeypatch.setattr("weights_cache.download.LISTING_TIMEOUT", 0.05)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    failing(hub, lambda method, path: method == "GET" and where in path, wait=0.3)
    assert "did not answer in time" in str(failure(DownloadFailed))


def test_a_cache_that_cannot_be_written_is_named(hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    error = failure(DownloadFailed)
    assert str(tmp_path / "file" / "cache") in str(error) and "HF_HUB_CACHE" in error.hint


def test_two_that_ask_at_once_both_get_the_whole_model(hub):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(fetch, [REPO, REPO]))
    assert folders[0] == folders[1] and names(folders[0]) == WHOLE
    assert checkpoint.open(folders[0]).tensor("lm_head.weight").shape == (300, 100)


def test_a_cut_connection_is_resumed_where_it_broke(hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    failing(hub, body_of(FIRST), times=1, cut=50_000)
    assert names(fetch(REPO)) == WHOLE
    ranges = [headers["range"] for _, path, headers in hub.requests if "range" in headers and path.endswith(FIRST)]
    assert ranges == ["bytes=50000-"]


def test_a_download_that_broke_off_is_never_taken_for_whole_and_goes_on_with_the_rest(hub):
    failing(hub, body_of(SECOND), cut=0)
    failure(DownloadFailed)
    assert cache.find(REPO, "main", weights=True) is None
    hub.fault = lambda method, path: None
    hub.requests.clear()
    assert names(fetch(REPO)) == WHOLE
    assert hub.fetched() == [SECOND]


@pytest.mark.parametrize("broken", sorted(SMALL))
def test_small_files_that_broke_off_are_never_taken_for_whole(hub, broken: str):
    failing(hub, body_of(broken), status=500)
    failure(DownloadFailed)
    assert cache.find(REPO, "main", weights=False) is None
    assert cache.find(REPO, hub.commit(REPO), weights=False) is None
    hub.fault = lambda method, path: None
    assert names(fetch(REPO)) == WHOLE


def test_a_file_shorter_than_its_header_says_is_not_taken_though_the_server_calls_it_whole(hub):
    good = hub.repos[REPO][SECOND]
    hub.repos[REPO][SECOND] = good[:-100]
    assert SECOND in str(failure(DownloadFailed))
    assert cache.find(REPO, "main", weights=True) is None
    assert SECOND in str(failure(DownloadFailed))


def test_an_index_that_names_an_absent_shard_is_reported(hub):
    del hub.repos[REPO][SECOND]
    assert SECOND in str(failure(DownloadFailed))


def test_offline_and_not_cached_is_one_sentence_and_no_request(hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert str(cache.hub_cache_folder()) in str(failure(Offline))
    assert hub.requests == []


def test_offline_and_forced_is_refused_even_when_cached(hub, monkeypatch: pytest.MonkeyPatch):
    fetch(REPO)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    failure(Offline, force=True)
    assert hub.requests == []


def test_a_full_disk_is_told_with_both_figures_before_the_weights_are_asked_for(hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    error = failure(DiskFull)
    assert error.free == 10_000 and error.needed >= 240_000
    assert FIRST not in hub.fetched()


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["config.json", "consolidated.safetensors"], WeightsNotFound),
        (["params.json"], WeightsNotFound),
        (["mmproj-f16.gguf"], WeightsNotFound),
        (["model-q4.gguf", "model-q8.gguf"], WeightsNotFound),
        (["config.json", "pytorch_model.bin"], PickleRefused),
    ],
)
def test_a_repository_without_one_whole_model_is_refused_before_a_byte_of_it_is_fetched(
    hub, files: list[str], kind: type
):
    hub.repos["acme/other"] = dict.fromkeys(files, b"{}")
    assert "acme/other" in str(failure(kind, "acme/other"))
    assert hub.fetched() == []
