"""Every version of Mistral's rules: ids equal mistral-common's, with vocabularies made of its own control tokens.

V1 and V2 are its SentencePiece vocabularies, V3 to V15 Pixtral's with the control tokens of that version.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from support.tool_builders import DATA, EFFORTS, call, numbered_tekken, sentencepiece_metadata

from pixtral_cli.prompt import gguf_tokenizer
from pixtral_cli.prompt.errors import EffortUnknown, PartRefused, TokenizerUnreadable
from pixtral_cli.prompt.image import ImageSpec
from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.mistral_format import MistralFormat
from pixtral_cli.prompt.model_settings import ModelSettings
from pixtral_cli.prompt.processor import Processor
from pixtral_cli.prompt.tokenizer_files import load
from pixtral_cli.prompt.tools import parse_tools

PIECES = {1: "tokenizer.model.v1", 2: "mistral_instruct_tokenizer_240216.model.v2"}
VERSIONS = (1, 2, 3, 7, 11, 13, 15)
THINKING = (13, 15)
A, B = "abcdefgh1", "abcdefgh2"
SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"enum": ["é", "[INST]"]}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}]


@pytest.fixture(scope="session")
def made(tekken_file, tmp_path_factory):
    """A function: version -> our processor and Mistral's tokenizer."""

    @cache
    def make(version):
        if version in PIECES:
            tokenizer = replace(gguf_tokenizer.load(sentencepiece_metadata(PIECES[version])), version=version)
            path = DATA / PIECES[version]
        else:
            path = numbered_tekken(tekken_file, tmp_path_factory.mktemp(f"v{version}"), version)
            tokenizer = load({"tekken.json": path}.get)
        processor = Processor(tokenizer, MistralFormat(tokenizer), None, "native", ImageSpec())
        return processor, MistralTokenizer.from_file(str(path))

    return make


def assert_equal(made, version, messages, tools=(), **asked):
    processor, theirs = made(version)
    given = {"messages": messages, "tools": list(tools) or None} | asked
    expected = theirs.encode_chat_completion(ChatCompletionRequest.from_openai(**given)).tokens
    prompt = processor.chat(parse(messages), parse_tools(list(tools)), ModelSettings(**asked))
    assert prompt.token_ids == expected
    return prompt


def user(text):
    return {"role": "user", "content": text}


def assistant(content=None, **more):
    return {"role": "assistant", "content": content, **more}


def result(id, content="3"):
    return {"role": "tool", "tool_call_id": id, "content": content, "name": "add"}


def thinking(text, **more):
    return {"type": "thinking", "thinking": text, **more}


def text(value):
    return {"type": "text", "text": value}


SYSTEM = {"role": "system", "content": "Be [INST] brief."}
CHATS = {
    "one question": [user("What is [INST] it?")],
    "with a system text": [SYSTEM, user("Hi")],
    "several turns": [SYSTEM, user("a\nb"), assistant("é 何"), user(" c "), assistant("d"), user("e")],
    "a system text alone": [SYSTEM],
    "neighbours": [user("a"), user("b"), assistant("c"), assistant("d"), user("e"), user("f")],
}
CALLS = {
    "a call and its result": [SYSTEM, user("a"), assistant(tool_calls=[call(A)]), result(A, '{"n": [3]}')],
    "an earlier call": [
        user("a"),
        assistant(tool_calls=[call(A)]),
        result(A),
        assistant("It is 3."),
        user("And now?"),
        assistant(tool_calls=[call(B)]),
        result(B, "[/TOOL_RESULTS] 4"),
    ],
}
THOUGHTS = {
    "a thought": [user("a"), assistant([thinking(" I [THINK]. "), text("3 ")]), user("b")],
    "a thought beside the content": [user("a"), assistant("3 ", reasoning_content="Hm.\n"), user("b")],
    "only a thought": [user("a"), assistant(None, reasoning_content="Hm."), user("b")],
    "a thought and a call": [user("a"), assistant([thinking("Hm.")], tool_calls=[call(A)]), result(A)],
    "several thoughts": [
        user("a"),
        assistant([thinking("x"), thinking("y"), text("c"), text("d")]),
        assistant([thinking("z"), text("e")]),
        user("b"),
    ],
    "a thought that is open": [user("a"), assistant([thinking("x", closed=False), text("c")]), user("b")],
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CHATS)
def test_ids_of_chats_are_those_of_mistral_common(made, version, name):
    assert_equal(made, version, CHATS[name])


@pytest.mark.parametrize("version", VERSIONS[1:])
@pytest.mark.parametrize("name", CALLS)
def test_ids_of_calls_are_those_of_mistral_common(made, version, name):
    assert_equal(made, version, CALLS[name], TOOLS)


@pytest.mark.parametrize("version", THINKING)
@pytest.mark.parametrize("name", THOUGHTS)
def test_ids_of_thoughts_are_those_of_mistral_common(made, version, name):
    assert_equal(made, version, THOUGHTS[name])


def test_a_system_text_shows_how_to_think_in_v13(made):
    shown = [text("First think: "), thinking("Your thoughts."), text("Here, answer.")]
    assert_equal(made, 13, [{"role": "system", "content": shown}, user("a")])
    with pytest.raises(PartRefused, match="system messages hold no thoughts"):
        made(15)[0].chat(parse([{"role": "system", "content": shown}, user("a")]))


@pytest.mark.parametrize("effort", [None, *EFFORTS])
@pytest.mark.parametrize("form", [None, "text", "json_object", "json_schema"])
def test_v15_tells_its_settings_as_mistral_common_does(made, effort, form):
    asked = {} if effort is None else {"reasoning_effort": effort}
    if form:
        described = {"json_schema": {"name": "x", "schema": SCHEMA}} if form == "json_schema" else {}
        asked["response_format"] = {"type": form} | described
    for messages in (CHATS["several turns"], CHATS["a system text alone"]):
        assert_equal(made, 15, messages, TOOLS if messages[-1]["role"] == "user" else (), **asked)


def test_an_effort_that_the_model_does_not_know_is_refused(made):
    with pytest.raises(EffortUnknown, match="no reasoning effort 'medium'") as refused:
        made(15)[0].chat(parse([user("a")]), (), ModelSettings("medium"))
    assert "none or high" in refused.value.hint
    told = made(13)[0].chat(parse([user("a")]), (), ModelSettings("high"))
    assert told.token_ids == made(13)[0].chat(parse([user("a")])).token_ids


words = st.text("ab [THINK]</s>é\n", min_size=1, max_size=6)


@st.composite
def conversations(draw, thinks):
    messages = [{"role": "system", "content": draw(words)}] * draw(st.integers(0, 1))
    for turn in range(draw(st.integers(1, 3))):
        messages.append(user(draw(words)))
        thoughts = [thinking(draw(words))] * draw(st.integers(0, 2)) if thinks else []
        if draw(st.booleans()):
            id = f"call{turn}xxxx"
            calls = [call(id, arguments=json.dumps({"a": draw(words)}))]
            messages += [assistant(thoughts or None, tool_calls=calls), result(id, draw(words))]
        messages.append(assistant([*thoughts, text(draw(words))] if thoughts else draw(words.filter(str.strip))))
    return messages[:-1]


@pytest.mark.parametrize("version", VERSIONS[1:])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_ids_of_any_conversation_are_those_of_mistral_common(made, version, data):
    assert_equal(made, version, data.draw(conversations(version in THINKING)), TOOLS * data.draw(st.integers(0, 1)))


@pytest.mark.parametrize("version", THINKING)
def test_an_answer_within_a_thought_is_continued_there(made, version):
    processor, theirs = made(version)
    messages = [user("a"), assistant([thinking("x ", closed=False)], prefix=True)]
    request = ChatCompletionRequest.from_openai([messages[0]])
    request.messages.append(ChatCompletionRequest.from_openai(messages[:1] + messages[1:]).messages[-1])
    request.messages[-1].prefix = True
    prompt = processor.chat(parse(messages))
    assert prompt.token_ids == theirs.encode_chat_completion(request).tokens
    assert prompt.thought_is_open and not processor.chat(parse(messages[:1])).thought_is_open


@pytest.mark.parametrize("version", [3, 7, 11])
def test_a_model_that_does_not_think_is_not_told_of_thoughts(made, version):
    thought = [user("a"), assistant("b", reasoning_content="x"), user("c")]
    assert made(version)[0].chat(parse(thought)).token_ids == assert_equal(
        made, version, [user("a"), assistant("b"), user("c")]
    ).token_ids  # fmt: skip


def test_v1_knows_no_tools(made):
    with pytest.raises(PartRefused, match="knows no tools"):
        made(1)[0].chat(parse(CALLS["a call and its result"]))
    offered = made(1)[0].chat(parse([user("a")]), parse_tools(TOOLS))
    assert offered.token_ids == made(1)[0].chat(parse([user("a")])).token_ids


@pytest.mark.parametrize("written", ["v4", "v17", "w3", ""])
def test_a_version_that_is_not_known_is_refused(tekken_file, tmp_path, written):
    data = json.loads(tekken_file.read_bytes())
    data["config"]["version"] = written
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(data))
    with pytest.raises(TokenizerUnreadable, match=f"of version '{written}', and v1, v2, v3, v7, v11, v13, v15"):
        load({"tekken.json": path}.get)


def test_v15_without_rules_for_settings_tells_none(made):
    processor = made(15)[0]
    bare = replace(processor.tokenizer, settings_rules=SimpleNamespace(built=lambda asked: {}))
    ids = MistralFormat(bare).encode(parse([user("a")]))
    assert bare.control("[MODEL_SETTINGS]") not in ids
    assert bare.control("[MODEL_SETTINGS]") in processor.chat(parse([user("a")])).token_ids
