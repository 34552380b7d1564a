"""Ids and bytes are those of mistral-common and tokenizers, and text never becomes a control id."""

from __future__ import annotations

import json
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pixtral_cli.prompt.errors import TextTooLong, TokenizerUnreadable
from pixtral_cli.prompt.mistral_format import MistralFormat
from pixtral_cli.prompt.tokenizer import ByteStream, Tokenizer
from pixtral_cli.prompt.tokenizer_files import load as load_tokenizer
from pixtral_cli.source import Source

TEXTS = [
    "Hello, world! 12345 3.14 don't I'LL",
    "  \t\n\n x   y\r\n\r\n z \n",
    "日本語のテキスト、中文字符。한국어 Ελληνικά",
    "👩‍👩‍👧‍👦🏳️‍🌈 é e\u0301 \u0301\u0301x",
    "def f(x):\n    return x**2  # note\n\n\n\tpass;;//\n/",
    "Привет, мир! مرحبا بالعالم ภาษาไทยไม่มีช่องว่าง हिन्दी",
    "a" * 300 + " " * 300 + "ab" * 200 + "ÀÉÎõü" * 30 + "ıİſẞ",
]
pieces = st.sampled_from(
    ["[INST]", "[/INST]", "[IMG]", "[IMG", "_BREAK]", "</s>", "<s>", "<", "s>", "[", "]", " ", "a"]
)
tricky = st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=12).map("".join)


def load(path) -> Tokenizer:
    return load_tokenizer({"tokenizer.json": path}.get)


def plain(path) -> tokenizers.Tokenizer:
    """The same file without its added tokens, so that it knows only text."""
    data = json.loads(path.read_text())
    data["added_tokens"], data["post_processor"] = [], None
    return tokenizers.Tokenizer.from_str(json.dumps(data))


@pytest.mark.parametrize("text", TEXTS)
def test_tekken_ids_are_those_of_mistral_common(tekken, mistral, text):
    assert tekken.encode(text) == mistral.instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False)


@given(st.one_of(st.text(max_size=80), tricky, st.text("abcXY 1\n\t.,é日", max_size=80)))
@settings(max_examples=300, deadline=None)
def test_tekken_ids_of_any_text_are_those_of_mistral_common(tekken, mistral, text):
    assert tekken.encode(text) == mistral.instruct_tokenizer.tokenizer.encode(text, bos=False, eos=False)


def test_tekken_bytes_of_every_id_are_those_of_mistral_common(tekken, mistral):
    reference = mistral.instruct_tokenizer.tokenizer
    assert tekken.id_limit == reference.n_words
    wrong = [id for id in range(reference.n_words) if tekken.token_bytes(id) != reference.id_to_byte_piece(id)]
    assert not wrong


def test_tekken_control_ids_are_those_of_mistral_common(tekken, mistral):
    theirs = mistral.instruct_tokenizer.tokenizer._special_tokens_reverse_vocab
    assert {text: control.id for text, control in tekken.controls.items()} == theirs
    assert (tekken.bos_id, tekken.eos_id) == (1, 2)


@given(text=tricky)
@settings(max_examples=200, deadline=None)
def test_a_control_string_in_text_is_text(tekken, byte_level_json, text):
    for tokenizer in (tekken, load(byte_level_json)):
        ids = tokenizer.encode(text)
        assert {control.id for control in tokenizer.controls.values()}.isdisjoint(ids)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_a_vocabulary_whose_merges_spell_a_control_token_still_gives_text(tmp_path):
    vocab = {"<s>": 0, "<": 1, "s": 2, ">": 3, "s>": 4}
    whole = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("s", ">"), ("<", "s>")]))
    whole.add_special_tokens(["<s>"])
    whole.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path / "tokenizer.json").encode("s><s>") == [4, 1, 2, 3]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_ids_are_those_of_the_tokenizers_library(byte_level_json, text):
    assert load(byte_level_json).encode(text) == plain(byte_level_json).encode(text).ids


@pytest.mark.parametrize("text", [*TEXTS, "a", " a", "", "\n"])
def test_sentencepiece_ids_are_those_of_the_tokenizers_library(sentencepiece_json, text):
    assert load(sentencepiece_json).encode(text) == plain(sentencepiece_json).encode(text).ids


@pytest.mark.parametrize("text", ["a red square", " a", "é\U0001f600 <0x41>"])
def test_sentencepiece_text_after_a_control_token_is_that_of_the_tokenizers_library(sentencepiece_json, text):
    whole = tokenizers.Tokenizer.from_file(str(sentencepiece_json))
    theirs = whole.encode("[INST]" + text, add_special_tokens=False).ids
    assert [3, *load(sentencepiece_json).encode(text, at_start=False)] == theirs


def test_template_text_is_cut_at_its_control_strings(byte_level_json):
    parts = load(byte_level_json).split_controls("<s>[INST] a[IMG_BREAK]</s>b[IMG")
    assert parts == [1, 3, " a", 12, 2, "b[IMG"]


def test_control_tokens_stand_for_no_bytes_and_unknown_ids_neither(tekken):
    assert [tekken.token_bytes(id) for id in (0, 2, 10, 999, 200_000)] == [b""] * 5


@given(st.lists(st.integers(0, 131_071), max_size=30))
@settings(max_examples=200, deadline=None)
def test_streamed_text_is_the_whole_text_and_has_no_broken_character(tekken, ids):
    stream = ByteStream(tekken)
    pieces = [stream.push(id) for id in ids]
    whole = b"".join(map(tekken.token_bytes, ids))
    assert "".join(pieces) + stream.finish() == whole.decode("utf-8", "replace")


@given(text=st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_valid_text_streams_without_a_replacement_character(tekken, text):
    stream = ByteStream(tekken)
    pieces = [stream.push(1000 + byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert stream.finish() == ""
    assert all(len(piece) <= 1 for piece in pieces)


@pytest.mark.parametrize("text", ["a red square", "  two", "é\U0001f600", "[bracket]\n"])
def test_sentencepiece_streams_what_the_tokenizers_library_decodes(sentencepiece_json, text):
    tokenizer = load(sentencepiece_json)
    ids = tokenizer.encode(text)
    stream = ByteStream(tokenizer)
    streamed = "".join(map(stream.push, ids)) + stream.finish()
    assert streamed == tokenizers.Tokenizer.from_file(str(sentencepiece_json)).decode(ids)


@pytest.mark.parametrize("unit", ["a red  square\n is left, of the\tblue 12 circle’s é ", "何 ", "redsquare"])
def test_a_long_text_has_the_ids_of_the_text_encoded_in_one(tekken, byte_level_json, unit):
    text = unit * (50_000 // len(unit))
    for tokenizer in (tekken, load(byte_level_json)):
        assert tokenizer.encode(text) == tokenizer.text_model.encode(text, add_special_tokens=False).ids


def test_a_long_sentencepiece_text_has_the_ids_of_the_text_encoded_in_one(sentencepiece_json):
    tokenizer, text = load(sentencepiece_json), "a red square " * 3_000
    assert tokenizer.encode(text) == tokenizer.text_model.encode(text, add_special_tokens=False).ids


class Recording:
    """A model of `tokenizers` that keeps the length of each text it was given."""

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        self.model, self.lengths = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode(self, text, **options):
        self.lengths.append(len(text))
        return self.model.encode(text, **options)


def test_a_long_text_of_words_is_encoded_in_parts(byte_level_json):
    """`tokenizers` takes more than twice as long for twice the text."""
    tokenizer = load(byte_level_json)
    tokenizer.text_model = Recording(tokenizer.text_model)
    tokenizer.encode("a red square " * 10_000)
    assert len(tokenizer.text_model.lengths) > 5 and max(tokenizer.text_model.lengths) < 20_000


def test_sentencepiece_keeps_the_first_space_of_a_continuation(sentencepiece_json):
    tokenizer = load(sentencepiece_json)
    stream = ByteStream(tokenizer, at_start=False)
    ids = tokenizer.encode(" red square", at_start=False)
    whole = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert whole.startswith(" ") and "".join(map(stream.push, ids)) + stream.finish() == whole


def test_half_a_surrogate_pair_becomes_a_replacement_character(tekken):
    assert b"".join(map(tekken.token_bytes, tekken.encode("a\ud800b"))).decode() == "a\ufffdb"


def test_tekken_is_the_truth_over_tokenizer_json(tekken_file, byte_level_json):
    files = {"tekken.json": tekken_file, "tokenizer.json": byte_level_json}
    assert load_tokenizer(files.get).id_limit == 131_072


def test_tokenizer_config_names_the_first_and_last_token(byte_level_json, tmp_path):
    (tmp_path / "c.json").write_text('{"bos_token": null, "eos_token": {"content": "[/INST]"}}')
    files = {"tokenizer.json": byte_level_json, "tokenizer_config.json": tmp_path / "c.json"}
    tokenizer = load_tokenizer(files.get)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 4)


@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3}', '{"vocab": []}'])
def test_a_damaged_tokenizer_file_is_one_sentence(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TokenizerUnreadable, match=re.escape(str(path))) as caught:
        load_tokenizer({name: path}.get)
    assert caught.value.hint


def test_a_tekken_pattern_that_is_none_is_one_sentence(tmp_path):
    config = {"pattern": "(", "default_num_special_tokens": 1, "default_vocab_size": 1, "version": "v3"}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": []}))
    with pytest.raises(TokenizerUnreadable, match=r"tekken\.json"):
        load_tokenizer({"tekken.json": tmp_path / "tekken.json"}.get)


def test_a_folder_without_a_tokenizer_is_one_sentence():
    with pytest.raises(TokenizerUnreadable, match=r"tokenizer\.json"):
        load_tokenizer(lambda name: None)


@pytest.mark.parametrize("text", ["word " * 400_000, "w" * 1_000_000, "字" * 1_000_000], ids=["words", "word", "han"])
def test_a_text_far_beyond_the_room_is_given_up_and_not_tokenised_to_its_end(text):
    tokenizer = Source.open("tiny").processor.tokenizer
    tokenizer.text_model, tokenizer.room = Recording(tokenizer.text_model), 4096
    with pytest.raises(TextTooLong, match="4,096"):
        tokenizer.encode(text)
    assert sum(tokenizer.text_model.lengths) < 40_000
    assert len(tokenizer.encode("word " * 1000)) < 4096


@pytest.mark.parametrize("mistral_rules", [False, True], ids=["template", "mistral"])
def test_a_conversation_far_beyond_the_room_is_given_up_and_not_tokenised_to_its_end(mistral_rules):
    source = Source.open("tiny")
    processor, tokenizer = source.processor, source.processor.tokenizer
    if mistral_rules:
        processor.chat_format = MistralFormat(tokenizer)
    tokenizer.text_model, tokenizer.room = Recording(tokenizer.text_model), 4096
    messages = [{"role": role, "content": "word " * 2000} for _ in range(50) for role in ("user", "assistant")]
    with pytest.raises(TextTooLong, match=r"[\d,]{7,} characters .* 4,096"):
        source.chat([*messages, {"role": "user", "content": "Hello"}])
    assert sum(tokenizer.text_model.lengths) < 200_000
    assert len(source.chat(messages[:3]).token_ids) > 4096  # a little more is counted, for the engine to say how much
