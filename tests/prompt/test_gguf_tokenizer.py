"""Promises of a tokenizer written in a GGUF. Oracle: the file that it was made from, read by its makers' library."""

from __future__ import annotations

import json
from base64 import b64decode
from types import SimpleNamespace

import pytest
import tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pixtral_cli.prompt import gguf_tokenizer
from pixtral_cli.prompt.errors import TokenizerUnreadable
from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.processor import Processor
from pixtral_cli.prompt.tokenizer import ByteStream

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TEXTS = [
    "a red square is left of the blue circle",
    " two  spaces   and\ttabs\n\n\nlines \r\n end ",
    "1234567 v1.2.3 don’t DON'T CamelCaseWord ÉCOLE straße",
    "何 é 🙂👩‍👩‍👧 नमस्ते مرحبا",
    "if (x >= 0) { return a[i]/2; } // done\n\n",
    "<s>[INST] [IMG] </s>",
    "",
    " ",
    "\n",
    "<0x0A> ▁ Ġ",
]


@pytest.fixture(scope="module")
def tekken_written(tekken_file):
    """Pixtral's own tekken.json as llama.cpp's converter writes it: every way to make an entry is a merge."""
    data = json.loads(tekken_file.read_text())
    special = data["config"]["default_num_special_tokens"]
    entries = data["vocab"][: data["config"]["default_vocab_size"] - special]
    letters = bytes_to_unicode()
    pieces = ["".join(letters[byte] for byte in b64decode(entry["token_bytes"])) for entry in entries]
    rank = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for piece in pieces[256:]:
        pairs = [(piece[:n], piece[n:]) for n in range(1, len(piece)) if piece[:n] in rank and piece[n:] in rank]
        merges += [" ".join(pair) for pair in sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]))]
    named = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
    named += ["[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"]
    controls = named + [f"<SPECIAL_{number}>" for number in range(len(named), special)]
    return {
        "model": "gpt2",
        "tokens": controls + pieces,
        "token_type": [CONTROL] * special + [NORMAL] * len(pieces),
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.fixture(scope="module")
def tekken_ours(tekken_written):
    """As the GGUFs of mistral-community/pixtral-12b call it."""
    return gguf_tokenizer.load(tekken_written | {"pre": "pixtral"})


def test_pixtrals_own_tokenizer_gives_the_ids_of_mistral_common(tekken_ours, tekken_written, mistral, tekken_file):
    pattern = json.loads(tekken_file.read_text())["config"]["pattern"]
    assert gguf_tokenizer.SPLITS["tekken"] == gguf_tokenizer.SPLITS["pixtral"] == (pattern, True)
    ours, theirs = tekken_ours, mistral.instruct_tokenizer.tokenizer
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, bos=False, eos=False), text
        assert b"".join(map(ours.token_bytes, ids)).decode() == text
    assert (ours.bos_id, ours.eos_id, ours.adds_bos, ours.control("[IMG]")) == (1, 2, True, 10)
    assert ours.id_limit == len(tekken_written["tokens"])


def written(path, model, **more):
    """A tokenizer.json's vocabulary in the words of a GGUF."""
    data = json.loads(path.read_text())
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    ids = data["model"]["vocab"] | added
    tokens = sorted(ids, key=ids.get)
    assert [ids[token] for token in tokens] == list(range(len(tokens)))
    kinds = {token: UNKNOWN if token == "<unk>" else CONTROL for token in added}
    kinds |= {token: BYTE for token in tokens if token.startswith("<0x") and len(token) == 6}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    base = {"model": model, "tokens": tokens, "token_type": [kinds.get(token, NORMAL) for token in tokens]}
    return base | {"merges": merges, "bos_token_id": added["<s>"], "eos_token_id": added["</s>"], **more}


def ids_of(path, text):
    """The ids by the library itself, for text without control strings."""
    return tokenizers.Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids


def test_a_byte_level_tokenizer_gives_the_ids_of_the_file_it_was_made_from(byte_level_json):
    data = json.loads(byte_level_json.read_text())
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    path = byte_level_json.with_name("gpt2.json")
    path.write_text(json.dumps(data))
    ours = gguf_tokenizer.load(written(path, "gpt2", pre="gpt-2"))
    for text in TEXTS:
        if "[IMG]" not in text:
            assert ours.encode(text) == ids_of(path, text), text
    assert not ours.adds_bos


def test_a_sentencepiece_tokenizer_gives_the_ids_of_the_file_it_was_made_from(sentencepiece_json):
    data = written(sentencepiece_json, "llama")
    del data["merges"]
    scores = [-float(id) for id in range(len(data["tokens"]))]  # trained in order of merging, as SentencePiece's are
    ours = gguf_tokenizer.load(data | {"scores": scores})
    for text in TEXTS:
        # Before a first space some of these files add another and some do not; GGUF always means another.
        if "[IMG]" not in text and text and not text.startswith(" "):
            assert ours.encode(text) == ids_of(sentencepiece_json, text), text
    assert ours.adds_bos and ours.drops_first_space


@pytest.mark.parametrize("file", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistrals_own_sentencepiece_models_give_the_ids_of_sentencepiece(tekken_file, file):
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(str(tekken_file.with_name(file)))
    ids = range(theirs.vocab_size())
    checks = {UNKNOWN: theirs.IsUnknown, CONTROL: theirs.IsControl, UNUSED: theirs.IsUnused, BYTE: theirs.IsByte}
    ours = gguf_tokenizer.load(
        {
            "model": "llama",
            "tokens": [theirs.IdToPiece(id) for id in ids],
            "scores": [theirs.GetScore(id) for id in ids],
            "token_type": [next((kind for kind, check in checks.items() if check(id)), NORMAL) for id in ids],
        }
    )
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text


def test_a_sentencepiece_text_comes_back_as_it_was(sentencepiece_json):
    data = written(sentencepiece_json, "llama")
    data["scores"] = [-float(id) for id in range(len(data["tokens"]))]
    for prefix in (True, False):
        ours = gguf_tokenizer.load(data | {"add_space_prefix": prefix})
        assert ours.drops_first_space == prefix
        for text in TEXTS:
            stream = ByteStream(ours)
            assert "".join(map(stream.push, ours.encode(text))) + stream.finish() == text.replace("▁", " ")


def test_control_strings_in_text_stay_text(tekken_ours, byte_level_json):
    for ours in (tekken_ours, gguf_tokenizer.load(written(byte_level_json, "gpt2", pre="gpt-2"))):
        ids = ours.encode("<s>[INST][IMG]</s>")
        assert not {ours.control(name) for name in ("<s>", "[INST]", "[IMG]", "</s>")} & set(ids)
        assert b"".join(map(ours.token_bytes, ids)) == b"<s>[INST][IMG]</s>"


def test_tokens_of_the_user_show_their_text_and_unused_ones_are_none(byte_level_json):
    data = written(byte_level_json, "gpt2", pre="gpt-2")
    tokens = [*data["tokens"], "<think>", "[PAD7]"]
    types = [*data["token_type"], USER_DEFINED, UNUSED]
    ours = gguf_tokenizer.load(data | {"tokens": tokens, "token_type": types})
    assert ours.token_bytes(len(tokens) - 2) == b"<think>"
    assert ours.token_bytes(len(tokens) - 1) == b""
    assert "<think>" in ours.controls and "[PAD7]" not in ours.controls


@pytest.mark.parametrize("template", [None, "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"])
def test_a_gguf_chats_by_its_own_template_or_by_mistrals_rules(byte_level_json, template):
    data = written(byte_level_json, "gpt2", pre="gpt-2", add_bos_token=True)
    data |= {"chat_template": template} if template else {}
    files = SimpleNamespace(form="gguf", written_tokenizer=data, file=lambda name: None)
    processor = Processor.from_checkpoint(files)
    ids = processor.chat(parse([{"role": "user", "content": "a red square"}])).token_ids
    assert ids == [1, 3, *processor.tokenizer.encode("a red square"), 4]
    assert processor.recipe == "hf" and processor.image_tokens.patch == 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "bert"}, "bert"),
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"pre": "qwen2"}, "qwen2"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"tokens": 7}, "tokens"),
        ({"tokens": ["a", 3]}, "tokens"),
        ({"token_type": [1, 1]}, "type"),
        ({"token_type": 1}, "type"),
        ({"merges": None}, "merges"),
        ({"merges": ["ab"]}, "no pair"),
        ({"model": "llama"}, "score"),
        ({"model": "llama", "scores": [1.0]}, "score"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_sentence(byte_level_json, changes, said):
    with pytest.raises(TokenizerUnreadable, match=said) as failure:
        gguf_tokenizer.load(written(byte_level_json, "gpt2", pre="gpt-2") | changes)
    assert "\n" not in str(failure.value) and "--weight-path" in failure.value.hint


@pytest.mark.parametrize("id", [-1, 10**9, "1", None, 40])
def test_an_end_that_is_no_control_token_is_none(byte_level_json, id):
    assert gguf_tokenizer.load(written(byte_level_json, "gpt2", pre="gpt-2") | {"eos_token_id": id}).eos_id is None
