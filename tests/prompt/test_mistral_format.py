"""Mistral's own rules: ids equal to mistral-common's, with its real tekken file."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.chunk import ImageChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from support.tool_builders import call, later_tekken, mistral_ids, mistral_request

from pixtral_cli.prompt.image import ImageSpec
from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.mistral_format import MistralFormat
from pixtral_cli.prompt.processor import ImageTokens, Processor
from pixtral_cli.prompt.side_file import SideFile
from pixtral_cli.prompt.tokenizer_files import load as load_tokenizer
from pixtral_cli.prompt.tools import parse_tools

SMALL, WIDE = Image.new("RGB", (20, 40), "red"), Image.new("RGB", (1500, 300), "blue")
IMG, SMALL_IDS = 10, [10, 10, 12, 10, 10, 12, 10, 10, 13]
THEIR_ROLES = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}


def message(role, content):
    return {"role": role, "content": content}


def part(value):
    return {"type": "text", "text": value} if isinstance(value, str) else {"type": "image", "image": value}


def theirs(entry):
    content = entry["content"]
    if not isinstance(content, str):
        content = [TextChunk(text=p["text"]) if "text" in p else ImageChunk(image=p["image"]) for p in content]
    return THEIR_ROLES[entry["role"]](content=content)


def ids_of(mistral, version, messages):
    """Those of mistral-common, by its rules of that version."""
    given = mistral.instruct_tokenizer
    return mistral_ids(given.tokenizer, version, list(map(theirs, messages)), images=given.image_encoder)


@pytest.fixture(scope="session")
def native(tekken) -> Processor:
    return Processor(tekken, MistralFormat(tekken), ImageTokens.of(tekken, SideFile()), "native", ImageSpec())


CONVERSATIONS = {
    "one text": [message("user", "What is in the picture?")],
    "a system text": [message("system", "Be brief."), message("user", "Hi")],
    "a picture last": [message("user", [part("What?"), part(SMALL)])],
    "texts and a picture last": [message("user", [part("What?"), part("Now."), part(SMALL)])],
    "a picture first": [message("user", [part(SMALL), part("What?")])],
    "a picture between": [message("user", [part("Is"), part(SMALL), part("red?")])],
    "two pictures": [message("user", [part(SMALL), part(WIDE), part("Which is wider?")])],
    "two pictures last": [message("user", [part("Which?"), part(SMALL), part(WIDE)])],
    "only a picture": [message("user", [part(WIDE)])],
    "a list of texts": [message("system", "S"), message("user", [part("a"), part("b")])],
    "a system text and a picture": [message("system", "S"), message("user", [part("a"), part(SMALL)])],
    "several turns": [
        message("system", "S"),
        message("user", [part(SMALL), part("What?")]),
        message("assistant", "A red square.  "),
        message("user", "And\nnow?"),
        message("assistant", "Still.\n"),
        message("user", [part("This?"), part(WIDE)]),
    ],
    "consecutive messages of one role": [
        message("user", "a"),
        message("user", [part("b"), part(SMALL)]),
        message("user", [part(WIDE), part("c"), part("d")]),
        message("assistant", "x"),
        message("assistant", "y"),
        message("user", "e"),
        message("user", "f"),
    ],
    "several system texts": [message("system", "S"), message("system", [part("T"), part("U")]), message("user", "a")],
    "control strings": [
        message("user", "[INST] [IMG] </s> [/INST]"),
        message("assistant", "<s>[IMG_END]"),
        message("user", "["),
    ],
    "an empty message": [message("user", "")],
    "an empty system text": [message("system", ""), message("user", "a")],
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_v3_ids_are_those_of_mistral_common(native, mistral, name):
    messages = CONVERSATIONS[name]
    whole = mistral.encode_chat_completion(mistral_request(list(map(theirs, messages))))
    assert native.chat(parse(messages)).token_ids == whole.tokens


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if "empty system" not in name])
def test_v7_ids_are_those_of_mistral_common(native, mistral, tekken, name, monkeypatch):
    monkeypatch.setattr(tekken, "version", 7)
    assert native.chat(parse(CONVERSATIONS[name])).token_ids == ids_of(mistral, 7, CONVERSATIONS[name])


turns = st.lists(
    st.one_of(
        st.text("ab [INST]</s>\n", max_size=6),
        st.lists(st.sampled_from([SMALL, WIDE, "a", "b c", ""]), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


@given(system=st.sampled_from(["", "S", "S "]), contents=turns)
@settings(max_examples=60, deadline=None)
def test_ids_of_any_conversation_are_those_of_mistral_common(native, mistral, system, contents):
    messages = [message("system", system)] if system else []
    for values in contents:
        content = values if isinstance(values, str) else [part(value) for value in values]
        messages += [message("assistant", "ok")] * (len(messages) > 1) + [message("user", content)]
    assert native.chat(parse(messages)).token_ids == ids_of(mistral, 3, messages)


def test_the_golden_vectors_of_pixtral(native):
    chat = native.chat(parse([message("user", [part("a"), part(SMALL)])]))
    assert chat.token_ids == [1, 3, *SMALL_IDS, 1097, 4]
    chat = native.chat(parse([message("system", "hi"), message("user", [part("a"), part(SMALL)])]))
    assert chat.token_ids == [1, 3, 8101, 1267, *SMALL_IDS, 1097, 4]


def test_a_user_turn_that_is_missing_is_empty(native):
    ids = native.chat(parse([message("assistant", "a"), message("user", "b")])).token_ids
    assert ids[:4] == [1, 3, 4, 1097]


@pytest.mark.parametrize("said", ["It is", "It is  ", "[INST]", "a\n"])
@pytest.mark.parametrize("version", [3, 7])
def test_a_continued_answer_has_the_ids_of_mistral_commons_prefix(native, mistral, tekken, monkeypatch, version, said):
    monkeypatch.setattr(tekken, "version", version)
    messages = [message("system", "S"), message("user", "a"), message("assistant", said)]
    given = [*messages[:2], message("assistant", said) | {"prefix": True}]
    expected = mistral_ids(mistral.instruct_tokenizer.tokenizer, version, given)
    assert native.chat(parse(messages)).token_ids == expected


@pytest.mark.parametrize("version", [3, 7])
def test_a_system_text_alone_is_asked_as_mistral_common_asks_it(native, mistral, tekken, monkeypatch, version):
    monkeypatch.setattr(tekken, "version", version)
    messages = [message("system", "S")]
    assert native.chat(parse(messages)).token_ids == ids_of(mistral, version, messages)


def test_tools_are_offered_without_a_user_turn(native, tekken, monkeypatch):
    tools = parse_tools([{"function": {"name": "add"}}])
    for version in (3, 7, 13):
        monkeypatch.setattr(tekken, "version", version)
        for said in ([message("system", "S")], [message("system", "S"), message("assistant", "a")]):
            ids = native.chat(parse(said), tools).token_ids
            assert ids.count(tekken.control("[AVAILABLE_TOOLS]")) == ids.count(3) == 1


def test_images_of_tools_follow_the_results_before_v15_in_their_order(native, tekken, monkeypatch):
    calls = [call("abcdefgh1"), call("abcdefgh2")]
    turns = [message("user", "a"), {"role": "assistant", "tool_calls": calls}]
    wide = {"role": "tool", "tool_call_id": "abcdefgh2", "content": [part(WIDE), part("w")]}
    small = {"role": "tool", "tool_call_id": "abcdefgh1", "content": [part(SMALL), part("s")]}
    texts = [result | {"content": result["content"][1]["text"]} for result in (wide, small)]
    for version in (3, 7, 11, 13):
        monkeypatch.setattr(tekken, "version", version)
        prompt = native.chat(parse([*turns, wide, small, message("user", "b")]))
        apart = native.chat(parse([*turns, *texts, message("user", [part(WIDE), part(SMALL), part("b")])]))
        assert prompt.token_ids == apart.token_ids and len(prompt.images) == 2
        assert [image.original_size for image in prompt.images] == [WIDE.size, SMALL.size]


def test_images_of_tools_stand_in_their_results_from_v15_on(fifteen):
    ours, theirs = fifteen
    calls = [call("abcdefgh1"), call("abcdefgh2")]
    turns = [message("user", "a"), {"role": "assistant", "tool_calls": calls}]
    wide = {"role": "tool", "tool_call_id": "abcdefgh2", "content": [part("w"), part(WIDE), part("x"), part("y")]}
    small = {"role": "tool", "tool_call_id": "abcdefgh1", "content": [part("s"), part(SMALL)]}
    given = [UserMessage(content="a"), AssistantMessage(tool_calls=calls)]
    for result in (wide, small):
        chunks = [TextChunk(text=p["text"]) if "text" in p else ImageChunk(image=p["image"]) for p in result["content"]]
        given.append(ToolMessage(content=chunks, tool_call_id=result["tool_call_id"]))
    expected = theirs.encode_chat_completion(mistral_request(given))
    prompt = ours.chat(parse([*turns, wide, small]))
    assert prompt.token_ids == expected.tokens
    assert [image.original_size for image in prompt.images] == [SMALL.size, WIDE.size]


@pytest.fixture(scope="session")
def fifteen(tekken_file, tmp_path_factory):
    """Pixtral's vocabulary as one of V15, as ours and as Mistral's."""
    names = ("[CALL_ID]", "[ARGS]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]")
    folder = tmp_path_factory.mktemp("fifteen")
    path = later_tekken(tekken_file, folder, "v15", *names, model_settings_builder={})
    ours = load_tokenizer({"tekken.json": path}.get)
    made = Processor(ours, MistralFormat(ours), ImageTokens.of(ours, SideFile()), "native", ImageSpec())
    return made, MistralTokenizer.from_file(str(path))
