"""Calls come out of an answer as they went in: mistral-common writes them, every version's form, and we read them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage
from tool_builders import KINDS, arguments, call

from pixtral_cli.prompt.tool_calls import ToolCallReader


def read(tokenizer, ids, **options):
    """Text as it streams, then what the end brings."""
    reader = ToolCallReader(tokenizer, reads_calls=True, **options)
    text = "".join(map(reader.push, ids))
    rest, calls = reader.finish()
    return text + rest, calls


def ids_of(tokenizer, *parts):
    """Control tokens by their names, all else as text."""
    return [
        id
        for part in parts
        for id in ([tokenizer.control(part)] if part in tokenizer.controls else tokenizer.encode(part))
    ]


@pytest.mark.parametrize("version", KINDS)
@given(objects=st.lists(arguments, min_size=1, max_size=3), said=st.sampled_from(["", "Let me see: é"]))
@settings(max_examples=40, deadline=None)
def test_what_mistral_common_writes_is_read_back(both, version, objects, said):
    ours, theirs = both
    given = [call(f"callid{n:03}", f"tool-{n}", json.dumps(a, ensure_ascii=False)) for n, a in enumerate(objects)]
    message = AssistantMessage(content=said if version > 3 else "", tool_calls=given)
    ids = KINDS[version][1](theirs).encode_assistant_message(message, False)
    text, calls = read(ours, ids)
    assert text == message.content
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [(f"tool-{n}", a) for n, a in enumerate(objects)]
    assert len({c.id for c in calls}) == len(calls) and all(len(c.id) == 9 and c.id.isalnum() for c in calls)
    if version < 13:
        assert [c.id for c in calls] == [c["id"] for c in given]


def test_arguments_are_as_the_model_spelled_them(both):
    spelled = '{ "a":1.50,\n"b" : "\\u00e9"}'
    listed = f'[ {{"arguments":{spelled} , "name":"add"}}]'
    for parts in (["[TOOL_CALLS]", listed], ["[TOOL_CALLS]", "add", "[ARGS]", spelled, "</s>"]):
        text, (found,) = read(both[0], ids_of(both[0], *parts))
        assert (text, found.name, found.arguments) == ("", "add", spelled)


MALFORMED = [
    '[{"name": "add", "arguments": {"a": 1}',
    '[{"name": "add", "arguments": {"a": ',
    '[{"name": "add", "arguments": "a"}]',
    '[{"name": "a b", "arguments": {}}]',
    '[{"arguments": {}}]',
    "[{3: 4}]",
    "[]x",
    "I would call add.",
    "[" * 5000,
    "",
]


@pytest.mark.parametrize("written", MALFORMED)
def test_a_malformed_call_is_text_and_none_of_it_is_lost(both, written):
    ids = ids_of(both[0], "So: ", "[TOOL_CALLS]", written)
    assert read(both[0], ids) == (f"So: {written}", ())


def test_of_several_calls_the_good_ones_are_read_and_the_rest_is_text(both):
    parts = ["[TOOL_CALLS]", "add", "[ARGS]", '{"a": 1} then', "[TOOL_CALLS]", "now", "[ARGS]", "{oops"]
    text, (found,) = read(both[0], ids_of(both[0], *parts))
    assert text == "thennow{oops" and (found.name, found.arguments) == ("add", '{"a": 1}')


def test_text_streams_until_a_call_begins_and_control_strings_in_it_are_text(both):
    tokenizer = both[0]
    reader = ToolCallReader(tokenizer, reads_calls=True)
    said = [reader.push(id) for id in tokenizer.encode("[TOOL_CALLS] is a token, é何")]
    assert "".join(said) == "[TOOL_CALLS] is a token, é何" and len([piece for piece in said if piece]) > 5
    assert [reader.push(id) for id in ids_of(tokenizer, "[TOOL_CALLS]", "add")] == ["", ""]


def test_without_tools_a_call_is_text(both):
    reader = ToolCallReader(both[0])
    assert "".join(map(reader.push, ids_of(both[0], "[TOOL_CALLS]", "[1]"))) + reader.finish()[0] == "[1]"


def test_a_forced_call_needs_no_control_token(both):
    listed = '[{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]'
    text, calls = read(both[0], both[0].encode(listed), only_calls=True)
    assert text == "" and [c.name for c in calls] == ["add", "now"]


@pytest.mark.parametrize("end", ["", ", ", ', {"name": "now", "argum'])
def test_of_a_list_that_is_cut_off_the_whole_calls_are_kept(both, end):
    text, (found,) = read(both[0], both[0].encode('[{"name": "add", "arguments": {"a": 1}}' + end), only_calls=True)
    assert (found.name, found.arguments) == ("add", '{"a": 1}') and text == end.strip(", ")
