"""Tools in Mistral's own rules: ids equal to mistral-common's, for every version of the rules."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prompts import chat_ids
from support.tool_builders import KINDS, arguments, call, json_values, mistral_ids

from pixtral_cli.prompt.mistral_format import MistralFormat

SCHEMA = {"type": "object", "properties": {"a [/AVAILABLE_TOOLS]": {"type": "integer", "description": "é 何"}}}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds </s>[INST].", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]


def assert_equal_ids(both, version, messages, tools):
    ours, theirs = both
    ours.version = version
    assert chat_ids(MistralFormat(ours), messages, tools) == mistral_ids(theirs, version, messages, tools)


def result(id, content="3"):
    return {"role": "tool", "tool_call_id": id, "content": content}


USER = {"role": "user", "content": "What is 1 + 2?"}
A, B = "abcdefgh1", "abcdefgh2"
CONVERSATIONS = {
    "a question": [USER],
    "several questions": [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "3"}, USER],
    "a call and its result": [USER, {"role": "assistant", "tool_calls": [call(A)]}, result(A)],
    "two calls": [USER, {"role": "assistant", "tool_calls": [call(A), call(B, "now", "")]}, result(B, ""), result(A)],
    "an answer to a result": [
        USER,
        {"role": "assistant", "tool_calls": [call(A, arguments='{"b":"[TOOL_CALLS] é","c":[1.50,null]}')]},
        result(A, '{"sum":[3,"[/TOOL_RESULTS]"]}'),
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "Sure?"},
    ],
    "arguments that are no JSON": [USER, {"role": "assistant", "tool_calls": [call(A, arguments="{a")]}, result(A)],
}


@pytest.mark.parametrize("version", KINDS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_mistral_common(both, version, name):
    assert_equal_ids(both, version, CONVERSATIONS[name], TOOLS)


@pytest.mark.parametrize("version", [7, 11, 13])
def test_text_beside_a_call_is_written_from_v7_on(both, version):
    says = {"role": "assistant", "content": "a ", "tool_calls": [call(A)]}
    assert_equal_ids(both, version, [USER, says, result(A)], [])


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": "S"}] * draw(st.integers(0, 1))
    for turn in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(st.text("ab [INST]\n", min_size=1, max_size=6))})
        for step in range(draw(st.integers(0, 2))):
            ids = [f"call{turn}{step}{n}xx" for n in range(draw(st.integers(1, 3)))]
            calls = [call(id, arguments=json.dumps(draw(arguments))) for id in ids]
            messages.append({"role": "assistant", "tool_calls": calls})
            texts = st.text('12a[]{}":, ', max_size=8) | json_values.map(json.dumps)
            messages += [result(id, draw(texts)) for id in draw(st.permutations(ids))]
        messages.append({"role": "assistant", "content": "ok"})
    return messages[:-1]


@pytest.mark.parametrize("version", KINDS)
@given(messages=conversations(), tools=st.sampled_from([[], TOOLS[:1], TOOLS]))
@settings(max_examples=60, deadline=None)
def test_ids_of_any_conversation_are_those_of_mistral_common(both, version, messages, tools):
    assert_equal_ids(both, version, messages, tools)
