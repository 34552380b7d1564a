"""What people paste as a model's name: each has one meaning, or a sentence."""

import pytest

from weights_cache.errors import ModelNotFound
from weights_cache.repo_name import Repo, parse


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", Repo("owner/name")),
        ("owner/name@v1", Repo("owner/name", "v1")),
        ("owner/name:sub/model.gguf", Repo("owner/name", file="sub/model.gguf")),
        ("owner/name@v1:Q8_0", Repo("owner/name", "v1", "Q8_0")),
        ("owner/name:UD-Q4_K_XL", Repo("owner/name", file="UD-Q4_K_XL")),
        ("https://huggingface.co/owner/name", Repo("owner/name")),
        ("HTTPS://HuggingFace.co/owner/name/", Repo("owner/name")),
        ("http://www.huggingface.co/owner/name?library=transformers#usage", Repo("owner/name")),
        ("huggingface.co/owner/name", Repo("owner/name")),
        ("hf.co/owner/name", Repo("owner/name")),
        ("hf.co/owner/name:Q4_K_M", Repo("owner/name", file="Q4_K_M")),
        ("https://huggingface.co/owner/name/tree/main", Repo("owner/name")),
        ("https://huggingface.co/owner/name/tree/v1.0", Repo("owner/name", "v1.0")),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F3", Repo("owner/name", "refs/pr/3")),
        ("https://huggingface.co/owner/name/tree/refs/pr/3", Repo("owner/name", "refs/pr/3")),
        ("https://huggingface.co/owner/name/blob/main/model-Q8_0.gguf", Repo("owner/name", file="model-Q8_0.gguf")),
        ("https://hf.co/owner/name/resolve/v1/a/b.gguf?download=true", Repo("owner/name", "v1", "a/b.gguf")),
        ("https://huggingface.co/owner/name/blob/main/config.json", Repo("owner/name")),
    ],
)
def test_a_name_or_a_pasted_address_has_its_plain_meaning(name: str, expected: Repo):
    assert parse(name) == expected


def test_the_address_of_a_mirror_counts_as_the_hubs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hub/")
    assert parse("https://mirror.example/hub/owner/name/tree/v1") == Repo("owner/name", "v1")


@pytest.mark.parametrize(
    "name",
    [
        "https://example.com/owner/name",
        "https://example.com/model.gguf",
        "https://[bad/owner",
        "https://huggingface.co",
        "https://huggingface.co/owner",
        "https://huggingface.co/datasets/owner/name",
        "https://huggingface.co/owner/name/discussions/3",
        "https://huggingface.co/owner/name/tree/main/BF16",
        "https://huggingface.co/owner/name/blob/../../x.gguf",
        "https://huggingface.co/owner/name/blob/main/%2e%2e/x.gguf",
        "s3://bucket/name",
    ],
)
def test_another_address_is_a_sentence_that_says_what_to_give(name: str):
    with pytest.raises(ModelNotFound) as refused:
        parse(name)
    assert "owner/name" in refused.value.hint and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["owner/name:", "owner/name:a b", "owner/name@v1@v2", "a/b/c", "./x", "x.gguf"])
def test_what_is_no_name_stays_none(name: str):
    with pytest.raises(ModelNotFound):
        parse(name)
