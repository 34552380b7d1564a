"""Which form of a model is fetched when a repository has several, and that nothing of the others is."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from weights_cache import cache, checkpoint
from weights_cache.errors import DownloadFailed, ModelNotFound, Offline, WeightsError, WeightsNotFound
from weights_cache.hub import fetch

REPO = "acme/all-forms"
HF = {"config.json": b"{}", "tokenizer.json": b'{"model": {}}'}
NATIVE = {"params.json": b'{"dim": 1}', "tekken.json": b'{"t": 1}'}


@pytest.fixture
def repo(hub, single_file):
    """A repository with every form: Hugging Face's, Mistral's own, two GGUF models with picture parts."""
    ggufs = ["a-Q4_K.gguf", "a-Q8_0.gguf", "mmproj-a-f32.gguf", "mmproj-a-F16.gguf", "sub/b.gguf", "sub/mmproj-b.gguf"]
    ggufs += ["big-00001-of-00002.gguf", "big-00002-of-00002.gguf"]
    weights = {"model.safetensors": single_file, "consolidated.safetensors": single_file.replace(b"1234", b"5678")}
    hub.repos[REPO] = HF | NATIVE | weights | {name: b"GGUF " + name.encode() for name in ggufs}
    return hub


@pytest.fixture
def single_file() -> bytes:
    return save({"a": np.frombuffer(b"1234", np.uint8)})


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def failure(kind: type[WeightsError], name: str, **options: object) -> WeightsError:
    with pytest.raises(kind) as caught:
        fetch(name, **options)
    return caught.value


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (None, {*HF, "tekken.json", "model.safetensors"}),
        ("hf", {*HF, "tekken.json", "model.safetensors"}),
        ("native", {*NATIVE, "tokenizer.json", "consolidated.safetensors"}),
    ],
)
def test_one_form_is_fetched_and_then_found_without_a_request(repo, form: str, expected: set[str]):
    folder = fetch(REPO, form=form)
    assert names(folder) == expected and set(repo.fetched()) == expected
    repo.requests.clear()
    assert fetch(REPO, form=form) == folder and repo.requests == []


def test_of_several_forms_the_choice_is_said_once_and_not_when_it_was_asked_for(repo):
    told = []
    fetch(REPO, form="native", tell=told.append)
    assert told == []
    folder = fetch(REPO, form=None, tell=told.append)
    assert len(told) == 1 and all(word in told[0] for word in (REPO, "Mistral's own", "hf is read", "--weights-format"))
    fetch(REPO, tell=told.append)
    assert len(told) == 1
    assert checkpoint.open(folder).note.endswith("hf is read, and --weights-format chooses another.")


@pytest.mark.parametrize(
    ("entry", "parts", "taken"),
    [
        ("q4/model.gguf", {"mmproj.gguf": 1}, "mmproj.gguf"),
        ("model.gguf", {"pictures/mmproj.gguf": 1}, "pictures/mmproj.gguf"),
        ("q4/model.gguf", {"pictures/mmproj.gguf": 1}, "pictures/mmproj.gguf"),
        ("q4/model.gguf", {"mmproj.gguf": 1, "pictures/mmproj-bf16.gguf": 2}, "mmproj.gguf"),
        ("model.gguf", {"mmproj-f32.gguf": 9, "mmproj-F16.gguf": 5, "mmproj-BF16.gguf": 5}, "mmproj-BF16.gguf"),
        ("model.gguf", {"mmproj-f32.gguf": 9, "mmproj-model-f16.gguf": 5, "mmproj.gguf": 99}, "mmproj-model-f16.gguf"),
        ("model.gguf", {"mmproj-f32.gguf": 9, "mmproj-q8_0.gguf": 5, "mmproj-big.gguf": 99}, "mmproj-f32.gguf"),
        ("model.gguf", {"mmproj-q8_0.gguf": 5, "mmproj-big.gguf": 99}, "mmproj-big.gguf"),
    ],
)
def test_a_picture_part_elsewhere_in_the_repository_is_fetched_too(hub, entry, parts, taken):
    content = {name: b"GGUF" + b"x" * size for name, size in parts.items()}
    hub.repos["acme/apart"] = {entry: b"GGUF", **content}
    said: list[str] = []
    fetch(f"acme/apart:{entry}", tell=said.append)
    assert set(hub.fetched()) == {entry, taken}
    chosen = len([name for name in parts if Path(name).parent == Path(taken).parent]) > 1
    assert len(said) == chosen and all(taken in each and "bf16 before f16" in each for each in said)
    fetch(f"acme/apart:{entry}", tell=said.append)
    assert len(said) == chosen


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("a-Q4_K.gguf", {"a-Q4_K.gguf", "mmproj-a-F16.gguf"}),
        ("sub/b.gguf", {"sub/b.gguf", "sub/mmproj-b.gguf"}),
        ("big-00002-of-00002.gguf", {"big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "mmproj-a-F16.gguf"}),
        ("mmproj-a-f32.gguf", {"mmproj-a-f32.gguf"}),
    ],
)
def test_a_named_gguf_comes_with_all_its_parts_and_the_picture_part_beside_it(repo, file: str, expected: set[str]):
    path = fetch(f"{REPO}:{file}")
    assert path.name == Path(file.replace("00002-of", "00001-of")).name and path.is_file()
    assert set(repo.fetched()) == expected
    repo.requests.clear()
    assert fetch(f"{REPO}:{file}") == path and fetch(f"{REPO}@main:{file}", weights=False) == path
    assert repo.requests == []


def test_a_gguf_whose_picture_part_is_gone_is_not_complete(repo):
    path = fetch(f"{REPO}:a-Q4_K.gguf")
    (path.parent / "mmproj-a-F16.gguf").unlink()
    repo.requests.clear()
    assert fetch(f"{REPO}:a-Q4_K.gguf") == path and (path.parent / "mmproj-a-F16.gguf").is_file()


def test_a_gguf_that_arrived_without_its_picture_part_is_not_complete_for_a_commit_either(repo):
    from support import fake_hub

    name = f"{REPO}@{repo.commit(REPO)}:a-Q4_K.gguf"
    repo.fault = lambda method, path: fake_hub.Fault(status=404) if "mmproj" in path else None
    failure(DownloadFailed, name)
    repo.fault = lambda method, path: None
    assert (fetch(name).parent / "mmproj-a-F16.gguf").is_file()


def test_a_cached_gguf_does_not_stand_for_the_preferred_form(repo):
    fetch(f"{REPO}:a-Q4_K.gguf")
    assert (fetch(REPO) / "model.safetensors").is_file()


def test_without_a_network_the_form_that_is_here_is_used(repo, monkeypatch: pytest.MonkeyPatch):
    folder = fetch(REPO, form="native")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(REPO) == folder
    failure(Offline, REPO, form="hf")


def test_the_only_gguf_needs_no_name(repo):
    repo.repos["acme/one"] = {"x.gguf": b"GGUF x", "mmproj.gguf": b"GGUF m", "README.md": b""}
    path = fetch("acme/one")
    assert path.name == "x.gguf" and sorted(repo.fetched()) == ["mmproj.gguf", "x.gguf"]
    repo.requests.clear()
    assert fetch("acme/one") == path and repo.requests == []


def test_of_several_ggufs_one_must_be_named_and_the_error_names_them(repo):
    repo.repos["acme/two"] = {"x.gguf": b"GGUF", "y.gguf": b"GGUF"}
    error = failure(WeightsNotFound, "acme/two")
    assert "x.gguf, y.gguf" in str(error) and "acme/two:x.gguf" in error.hint
    assert repo.fetched() == []


def test_a_file_that_is_not_there_is_named_with_those_that_are(repo):
    error = failure(ModelNotFound, f"{REPO}:no.gguf")
    assert "no.gguf" in str(error) and "a-Q4_K.gguf" in error.hint
    failure(ModelNotFound, f"{REPO}:../a.gguf")


def test_a_form_that_is_not_there_is_refused_with_those_that_are(repo):
    repo.repos["acme/hf"] = HF | {"model.safetensors": b""}
    error = failure(WeightsNotFound, "acme/hf", form="native")
    assert "native" in str(error).lower() or "Mistral" in str(error)
    assert "--weights-format hf" in error.hint and repo.fetched() == []


@pytest.mark.parametrize("number", ["00001-of-00000", "00003-of-00002", "00000-of-00002"])
def test_a_file_that_is_none_of_the_parts_it_counts_stands_alone(hub, number):
    hub.repos["acme/odd"] = {f"x-{number}.gguf": b"GGUF x"}
    assert fetch(f"acme/odd:x-{number}.gguf").read_bytes() == b"GGUF x"


def test_a_repository_that_lacks_a_part_of_a_gguf_is_reported(repo):
    repo.repos["acme/half"] = {"x-00001-of-00002.gguf": b"GGUF"}
    assert "x-00002-of-00002.gguf" in str(failure(WeightsError, "acme/half"))


def test_a_cache_of_ours_that_cannot_be_written_costs_nothing(repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PIXTRAL_CACHE", str(tmp_path / "file" / "own"))
    folder = fetch(REPO)
    assert fetch(REPO) == folder


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PIXTRAL_CACHE": "/x/own", "XDG_CACHE_HOME": "/x/x"}, "/x/own"),
        ({"XDG_CACHE_HOME": "/x/x"}, "/x/x/pixtral"),
        ({"HOME": "/x/me"}, "/x/me/.cache/pixtral"),
    ],
)
def test_our_own_cache_is_where_the_environment_says(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
):
    for name in ("PIXTRAL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache.own_cache_folder()) == expected


def test_a_revision_is_found_by_its_commit_as_well(repo):
    fetch(REPO)
    assert cache.find(REPO, repo.commit(REPO), weights=True) is not None


# --- a quantisation as the name of a file, as llama.cpp and Ollama have it


@pytest.mark.parametrize(
    ("tag", "files", "expected"),
    [
        ("Q8_0", ["m-Q4_K_M.gguf", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
        ("q4_k_m", ["m.Q4_K_S.gguf", "m.Q4_K_M.gguf"], "m.Q4_K_M.gguf"),
        ("Q4_K", ["m_Q4_K.gguf", "m_Q4_K_M.gguf"], "m_Q4_K.gguf"),
        ("Q4_0", ["m-Q4_0.gguf", "m-IQ4_0.gguf", "mmproj-Q4_0.gguf"], "m-Q4_0.gguf"),
        ("BF16", ["BF16/m-00001-of-00002.gguf", "BF16/m-00002-of-00002.gguf", "m-Q8_0.gguf"],
         "BF16/m-00001-of-00002.gguf"),
        ("UD-Q4_K_XL", ["m-UD-Q4_K_XL.gguf", "m-Q4_K_XL.gguf"], "m-UD-Q4_K_XL.gguf"),
    ],
)  # fmt: skip
def test_a_quantisation_names_the_one_file_that_has_it(hub, tag: str, files: list[str], expected: str):
    hub.repos["acme/many"] = {name: b"GGUF " + name.encode() for name in files}
    path = fetch(f"acme/many:{tag}")
    assert path.as_posix().endswith(expected) and expected in hub.fetched()
    assert not set(hub.fetched()) & {"m-IQ4_0.gguf", "m_Q4_K_M.gguf", "m-Q4_K_XL.gguf", "m.Q4_K_S.gguf"}
    hub.requests.clear()
    assert fetch(f"acme/many:{tag}") == path and hub.requests == []


@pytest.mark.parametrize("tag", ["Q5_0", "latest", "Q4_K_M"])
def test_a_quantisation_that_no_file_or_several_have_is_refused_with_the_files_there_are(hub, tag: str):
    hub.repos["acme/many"] = dict.fromkeys(("a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "b-Q8_0.gguf"), b"GGUF")
    error = failure(ModelNotFound, f"acme/many:{tag}")
    assert tag in str(error) and "a-Q4_K_M.gguf, b-Q4_K_M.gguf, b-Q8_0.gguf" in error.hint
    assert "acme/many:a-Q4_K_M.gguf" in error.hint and hub.fetched() == []


def test_a_quantisation_of_a_repository_without_ggufs_is_a_sentence(hub):
    hub.repos["acme/hf"] = HF | {"model.safetensors": b""}
    error = failure(ModelNotFound, "acme/hf:Q8_0")
    assert "no GGUF" in str(error) and "Q8_0" in error.hint and hub.fetched() == []


def test_a_pasted_address_is_fetched_as_the_name_is(repo):
    folder = fetch(f"https://huggingface.co/{REPO}/tree/main", form="hf")
    assert folder == fetch(REPO, form="hf") and f"/api/models/{REPO}/revision/main" in repo.requests[0][1]


def test_a_whole_file_beside_an_index_is_told(repo):
    repo.repos[REPO]["model.safetensors.index.json"] = b"{}"
    told = []
    fetch(REPO, form="hf", tell=told.append)
    assert len(told) == 1 and "model.safetensors is read" in told[0]
