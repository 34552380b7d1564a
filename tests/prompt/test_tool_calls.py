"""Calls come out of an answer as they went in: mistral-common writes them, every version's form, and we read them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage
from support.tool_builders import KINDS, arguments, call

from pixtral_cli.prompt.tool_calls import ToolCallReader, joined


def pieces(tokenizer, ids, cut=False, **options):
    """What each token adds, and the end."""
    reader = ToolCallReader(tokenizer, reads_calls=True, **options)
    return [*map(reader.push, ids), reader.finish(cut)]


def read(tokenizer, ids, **options):
    """The text and the calls of an answer."""
    found = pieces(tokenizer, ids, **options)
    return "".join(part.text for part in found), joined(delta for part in found for delta in part.calls)


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
    if version == 11:  # a list has the id behind the arguments, when the call was told long before
        assert [c.id for c in calls] == [c["id"] for c in given]


def test_arguments_are_as_the_model_spelled_them(both):
    spelled = '{ "a":1.50,\n"b" : "\\u00e9"}'
    listed = f'[ {{"arguments":{spelled} , "name":"add"}}]'
    for parts in (["[TOOL_CALLS]", listed], ["[TOOL_CALLS]", "add", "[ARGS]", spelled, "</s>"]):
        text, (found,) = read(both[0], ids_of(both[0], *parts))
        assert (text, found.name, found.arguments) == ("", "add", spelled)


MALFORMED = [
    '[{"name": "add"',
    '[{"name": "add", "x": oops, "arguments": {"a": 1}}]',
    '[{"name": "add", "arguments": "a"}]',
    '[{"name": "a b", "arguments": {}}]',
    '[{"arguments": {"a": 1}, "name": 1}]',
    '[{"arguments": {"a": 1}, "arguments": {"a": 2}, "name": "add"}]',
    " add {}",
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


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["[ARGS]", "{}"], "{}"),
        (["add", "[CALL_ID]", "id", "[CALL_ID]", "{}"], "addid{}"),
        (['[{"name":', "[ARGS]", '"add"}]'], '[{"name":"add"}]'),
    ],
)
def test_a_control_token_where_none_belongs_makes_no_call_and_no_text(both, parts, said):
    assert read(both[0], ids_of(both[0], "[TOOL_CALLS]", *parts)) == (said, ())


def test_what_is_malformed_is_told_as_text_at_once(both):
    ids = ids_of(both[0], "[TOOL_CALLS]", "I would call add, and then what?")
    assert len([part for part in pieces(both[0], ids) if part.text]) > 5


BEGUN = ["{", '{"a": ', '{"a": 1', "{oops", '{"a": "é']


@pytest.mark.parametrize("begun", BEGUN)
@pytest.mark.parametrize("cut", [False, True])
def test_a_call_that_has_begun_is_one_whatever_becomes_of_its_arguments(both, begun, cut):
    listed = '[{"name": "now", "arguments": {}}, {"name": "add", "arguments": ' + begun
    named = ["[TOOL_CALLS]", "now", "[ARGS]", "{}", "[TOOL_CALLS]", "add", "[ARGS]", begun]
    for parts in (["[TOOL_CALLS]", listed], named):
        text, (first, second) = read(both[0], ids_of(both[0], *parts), cut=cut)
        assert (text, first.arguments, second.name, second.arguments) == ("", "{}", "add", begun)


@pytest.mark.parametrize(
    ("parts", "calls"),
    [
        (["[TOOL_CALLS]"], []),
        (["[TOOL_CALLS]", "[{"], []),
        (["[TOOL_CALLS]", '[{"name": "ad'], []),
        (["[TOOL_CALLS]", '[{"arguments": {"a": 1}, "name": "ad'], []),
        (["[TOOL_CALLS]", '[{"name": "add"'], [("add", "")]),
        (["[TOOL_CALLS]", '[{"name": "add", "arguments":'], [("add", "")]),
        (["[TOOL_CALLS]", '[{"arguments": {"a": 1}, "name": "add"'], [("add", '{"a": 1}')]),
        (["[TOOL_CALLS]", '[{"name": "add", "arguments": {}, "id": "abc'], [("add", "{}")]),
        (["[TOOL_CALLS]", '[{"name": "add", "arguments": {}}, {"na'], [("add", "{}")]),
        (["[TOOL_CALLS]", "ad"], []),
        (["[TOOL_CALLS]", "add", "[CALL_ID]", "ab"], [("add", "")]),
        (["[TOOL_CALLS]", "add", "[ARGS]"], [("add", "")]),
        (["[TOOL_CALLS]", "add", "[ARGS]", "{}", "[TOOL_CALLS]", "no"], [("add", "{}")]),
        (["[TOOL_CALLS]", "add", "[ARGS]", "oops", "[TOOL_CALLS]"], []),
    ],
)
def test_of_an_answer_that_is_cut_off_every_call_with_a_name_is_told_and_none_of_it_is_text(both, parts, calls):
    text, found = read(both[0], ids_of(both[0], "So: ", *parts), cut=True)
    assert [(call.name, call.arguments) for call in found] == calls
    assert text == "So: " + ("addoops" if "oops" in parts else "")


def test_of_several_calls_what_is_no_call_is_text(both):
    parts = ["[TOOL_CALLS]", "add", "[ARGS]", '{"a": 1} then', "[TOOL_CALLS]", "now", "[ARGS]", "oops"]
    text, (found,) = read(both[0], ids_of(both[0], *parts))
    assert text == "thennowoops" and (found.name, found.arguments) == ("add", '{"a": 1}')


def test_text_streams_until_a_call_begins_and_control_strings_in_it_are_text(both):
    tokenizer = both[0]
    reader = ToolCallReader(tokenizer, reads_calls=True)
    said = [reader.push(id).text for id in tokenizer.encode("[TOOL_CALLS] is a token, é何")]
    assert "".join(said) == "[TOOL_CALLS] is a token, é何" and len([piece for piece in said if piece]) > 5
    assert [reader.push(id) for id in ids_of(tokenizer, "[TOOL_CALLS]", "add")] == [("", (), "")] * 2


def test_without_tools_a_call_is_text(both):
    reader = ToolCallReader(both[0])
    ids = ids_of(both[0], "[TOOL_CALLS]", "[1]")
    assert "".join(reader.push(id).text for id in ids) + reader.finish().text == "[1]"


spaces = st.text(" \n\t", max_size=2)


@st.composite
def lists(draw):
    """A list of calls as JSON allows it to be spelled, whatever the order of the keys."""
    entries = []
    for objects in draw(st.lists(arguments, min_size=1, max_size=3)):
        entry = {"name": f"tool-{len(entries)}", "arguments": objects, "id": "abcdefghi", "type": {"x": ["{", 1.5]}}
        keys = draw(st.permutations(list(entry)))
        left_out = draw(st.sets(st.sampled_from(["arguments", "id", "type"])))
        entries.append({key: entry[key] for key in keys if key not in left_out})
    separators = draw(st.tuples(st.sampled_from([", ", ",\n", " ,"]), st.sampled_from([":", " : "])))
    return draw(spaces) + json.dumps(entries, separators=separators, ensure_ascii=draw(st.booleans())) + draw(spaces)


def cut_at(draw, text):
    places = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=20))})
    return [text[start:end] for start, end in pairwise(places)]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_however_a_list_is_cut_into_tokens_its_calls_are_those_that_json_says(both, data):
    listed = data.draw(lists())
    ids = [id for piece in cut_at(data.draw, listed) for id in both[0].encode(piece)]
    text, calls = read(both[0], ids, only_calls=True)
    expected = [(entry["name"], entry.get("arguments", {})) for entry in json.loads(listed)]
    assert text == "" and [(call.name, json.loads(call.arguments)) for call in calls] == expected
    assert all(len(call.id) == 9 for call in calls)


@given(data=st.data(), written=st.text('[{"name": ad, gumets}]\\é1 \n', max_size=40), cut=st.booleans())
@settings(max_examples=150, deadline=None)
def test_however_an_answer_is_cut_into_tokens_it_is_read_alike(both, data, written, cut):
    written = data.draw(st.sampled_from(["", '[{"name": "add", ', '[{"name": "add", "arguments": {"a": '])) + written
    whole = read(both[0], both[0].encode(written), only_calls=True, cut=cut)
    ids = [id for piece in cut_at(data.draw, written) for id in both[0].encode(piece)]
    text, calls = read(both[0], ids, only_calls=True, cut=cut)
    assert text == whole[0]
    assert [(call.name, call.arguments) for call in calls] == [(call.name, call.arguments) for call in whole[1]]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("pieces", [["::"], [":", ":"], ["add", " two"], ["add two"]])
def test_what_can_be_no_name_is_text_at_once_however_it_is_cut(both, pieces, cut):
    ids = [id for piece in pieces for id in both[0].encode(piece, at_start=False)]
    assert read(both[0], ids, only_calls=True, cut=cut) == ("".join(pieces), ())


def test_arguments_come_as_they_are_written_each_piece_once(both):
    spelled = json.dumps({"text": "It rains. " * 50})
    for parts in ([f'[{{"name": "add", "arguments": {spelled}}}]'], ["add", "[ARGS]", spelled]):
        ids = ids_of(both[0], "[TOOL_CALLS]", *parts)
        deltas = [delta for part in pieces(both[0], ids) for delta in part.calls]
        assert (deltas[0].name, deltas[0].arguments) == ("add", "") and len(deltas[0].id) == 9
        assert {(delta.index, delta.id, delta.name) for delta in deltas[1:]} == {(0, None, None)}
        assert "".join(delta.arguments for delta in deltas) == spelled and len(deltas) > 100


def test_each_call_has_its_own_index(both):
    listed = '[{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]'
    named = ["add", "[ARGS]", '{"a": 1}', "[TOOL_CALLS]", "now", "[ARGS]", "{}"]
    for parts in ([listed], named):
        found = pieces(both[0], ids_of(both[0], "[TOOL_CALLS]", *parts))
        heads = [(delta.index, delta.name) for part in found for delta in part.calls if delta.name]
        assert heads == [(0, "add"), (1, "now")]


def test_a_forced_call_needs_no_control_token(both):
    listed = '[{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]'
    text, calls = read(both[0], both[0].encode(listed), only_calls=True)
    assert text == "" and [c.name for c in calls] == ["add", "now"]


@pytest.mark.parametrize("end", ["", ", ", ', {"name": "now", "argum'])
def test_of_a_list_that_the_model_leaves_the_whole_calls_are_kept_and_the_rest_is_text(both, end):
    text, (found,) = read(both[0], both[0].encode('[{"name": "add", "arguments": {"a": 1}}' + end), only_calls=True)
    assert (found.name, found.arguments) == ("add", '{"a": 1}') and text == end.strip(", ")
