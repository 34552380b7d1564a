"""Tokenizers and folders for the prompt tests: Pixtral's real tekken.json, and small ones trained here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mistral_common
import pytest
import tokenizers
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from support.tool_builders import later_tekken
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pixtral_cli.prompt.tokenizer import Tokenizer
from pixtral_cli.prompt.tokenizer_files import load as load_tokenizer

CONTROLS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]",
)  # fmt: skip
WORDS = "a red square is left of the blue circle, [bracket] INST IMG 12 <s> how many? what’s that — 何 é\n\n".split(" ")
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="session")
def tekken_file() -> Path:
    return Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"


@pytest.fixture(scope="session")
def tekken(tekken_file: Path) -> Tokenizer:
    """Pixtral-12B's tokenizer, as this project reads it."""
    return load_tokenizer({"tekken.json": tekken_file}.get)


@pytest.fixture(scope="session")
def mistral(tekken_file: Path) -> MistralTokenizer:
    """Pixtral-12B's tokenizer, as its makers read it."""
    return MistralTokenizer.from_file(str(tekken_file))


@pytest.fixture(scope="session")
def both(tekken_file, tmp_path_factory):
    """Pixtral's vocabulary with the control tokens of the later versions added, as ours and as Mistral's."""
    path = later_tekken(tekken_file, tmp_path_factory.mktemp("later"), "v7", "[CALL_ID]", "[ARGS]")
    theirs = MistralTokenizer.from_file(str(path)).instruct_tokenizer.tokenizer
    return load_tokenizer({"tekken.json": path}.get), theirs


@pytest.fixture(scope="session")
def byte_level_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE with Pixtral's control tokens at their ids."""
    whole = tokenizers.Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    whole.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    whole.train_from_iterator([" ".join(WORDS)] * 4, _trainer(initial_alphabet=alphabet, vocab_size=600))
    return _saved(whole, tmp_path_factory)


@pytest.fixture(scope="session", params=["prepend", "first", "always"])
def sentencepiece_json(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece-like BPE with byte fallback, in each way that marks a text's beginning."""
    whole = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if request.param == "prepend":
        whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        whole.pre_tokenizer = pre_tokenizers.Metaspace("▁", request.param, split=False)
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    whole.train_from_iterator(
        [" ".join(WORDS)] * 4, _trainer(vocab_size=700, more=[f"<0x{n:02X}>" for n in range(256)])
    )
    return _saved(_with_byte_entries(whole), tmp_path_factory)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Makes what a Processor needs of a checkpoint: its form and side files, given as paths or text."""

    def make(form: str = "hf", **files: Path | str) -> SimpleNamespace:
        paths = {}
        for key, content in files.items():
            stem, _, suffix = key.rpartition("_")
            name = f"{stem}.{suffix}"
            paths[name] = content if isinstance(content, Path) else tmp_path / name
            if isinstance(content, str):
                paths[name].write_text(content)
        return SimpleNamespace(form=form, file=paths.get, written_tokenizer=None)

    return make


def _trainer(vocab_size: int, more: list[str] | None = None, **options: object) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*CONTROLS, *(more or [])], show_progress=False, **options
    )


def _with_byte_entries(whole: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The 256 bytes stay entries of the vocabulary, and are no added tokens."""
    data = json.loads(whole.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def _saved(whole: tokenizers.Tokenizer, factory: pytest.TempPathFactory) -> Path:
    whole.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROLS])
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = factory.mktemp("tokenizer") / "tokenizer.json"
    whole.save(str(path))
    return path
