"""OpenAI-style messages are read, and a wrong entry is named."""

from __future__ import annotations

import time
from base64 import b64encode
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pixtral_cli.prompt import media
from pixtral_cli.prompt.errors import InvalidMessages
from pixtral_cli.prompt.messages import Conversation, ImagePart, Message, TextPart, parse

USER = {"role": "user", "content": "hi"}


def user(*content):
    return [{"role": "user", "content": list(content)}]


def call(id="call_1", name="add", arguments="{}", type="function"):
    return {"id": id, "type": type, "function": {"name": name, "arguments": arguments}}


def asks(*calls, **fields):
    return {"role": "assistant", "tool_calls": list(calls), **fields}


def answers(id, content="3"):
    return {"role": "tool", "tool_call_id": id, "content": content}


def test_a_string_is_one_text():
    assert parse([USER]) == Conversation((Message("user", (TextPart("hi"),), is_string=True),))


def test_developer_is_another_word_for_system():
    assert parse([{"role": "developer", "content": "x"}, USER]).messages[0].role == "system"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "path": "a.png", "cache_control": {"type": "ephemeral"}},
    ],
)
def test_every_way_to_name_a_picture_gives_its_source(part):
    assert parse(user({"type": "text", "text": "x"}, part)).messages[0].parts == (TextPart("x"), ImagePart("a.png"))


@pytest.mark.parametrize("detail", ["low", "high", "auto", None])
def test_the_detail_of_a_picture_stands_beside_its_address(detail):
    parts = [{"type": "image_url", "image_url": {"url": "a", "detail": detail}}, {"type": "image", "path": "a"}]
    parts.append({**parts[1], "detail": detail})
    assert [picture.detail for picture in parse(user(*parts)).images] == [detail or "auto", "auto", detail or "auto"]
    with pytest.raises(InvalidMessages, match=r"content\[0\].*low.*'fine'"):
        parse(user({"type": "image_url", "image_url": {"url": "a", "detail": "fine"}}))


def test_a_pil_image_is_a_picture():
    image = Image.new("RGB", (1, 1))
    assert parse(user({"type": "image", "image": image})).images == [ImagePart(image)]


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "messages"),
        ({"role": "user"}, "messages"),
        ("hi", "messages"),
        (None, "messages"),
        (["hi"], "messages[0]"),
        ([USER, {"content": "x"}], "messages[1]"),
        ([{"role": ["user"], "content": "x"}], "messages[0]"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": 5}], "messages[0]"),
        (user("ok", 7), "messages[0].content[1]"),
        (user({"type": "text"}), "messages[0].content[0]"),
        (user({"type": "text", "text": None}), "messages[0].content[0]"),
        (user({"type": "video", "url": "x"}), "messages[0].content[0]"),
        (user({"type": "image_url"}), "messages[0].content[0]"),
        (user({"type": "image_url", "image_url": {"url": ""}}), "messages[0].content[0]"),
        (user({"type": "image_url", "image_url": {"url": 3}}), "messages[0].content[0]"),
        (user({"type": "image", "image": np.zeros((2, 2, 3))}), "messages[0].content[0]"),
        ([USER, {"role": "tool", "content": "x"}], "messages[1]"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{}]}, USER], "messages[1].tool_calls[0]"),
        ([USER, {"role": "assistant", "content": None}, USER], "messages[1]"),
        ([USER, {"role": "assistant", "tool_calls": {}}, USER], "messages[1]"),
        ([USER, {"role": "assistant", "tool_calls": "add"}, USER], "messages[1].tool_calls"),
        ([USER | {"tool_calls": [call()]}], "messages[0]"),
        ([USER, asks(call(), call(id=5))], "messages[1].tool_calls[1]"),
        ([USER, asks(call(type="code"))], "messages[1].tool_calls[0]"),
        ([USER, asks(call(name="a b"))], "messages[1].tool_calls[0].function.name"),
        ([USER, asks(call(arguments=[1]))], "messages[1].tool_calls[0].function.arguments"),
        ([USER, asks(call()), answers("other")], "messages[2].tool_call_id"),
        ([USER, answers("call_1"), asks(call()), USER], "messages[1].tool_call_id"),
        ([USER, asks(call()), answers("call_1") | {"name": 3}], "messages[2].name"),
        ([USER, asks(call()), answers("call_1") | {"content": None}], "messages[2]"),
        ([USER, asks(call())], "messages[1]"),
        ([USER, {"role": "function", "name": "add", "content": "3"}], "messages[1].name"),
        ([USER, asks(call()), {"role": "function", "content": "3"}], "messages[2].name"),
        ([USER, {"role": "assistant", "function_call": {"name": "a b"}}, USER], "messages[1].function_call.name"),
        ([USER, {"role": "assistant", "function_call": "add"}, USER], "messages[1].function_call"),
        ([USER, asks(call()), {"role": "assistant", "content": "So"}], "messages[1]"),
        ([USER, asks(call(arguments={"a": {1, 2}})), USER], "messages[1].tool_calls[0].function.arguments"),
        ([USER, {"role": "assistant", "refusal": 5}, USER], "messages[1]"),
        ([{"role": "system", "content": [{"type": "image", "url": "x"}]}, USER], "messages[0]"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "url": "x"}]}, USER], "messages[1]"),
    ],
)
def test_the_entry_that_is_wrong_is_named(messages, where):
    with pytest.raises(InvalidMessages) as caught:
        parse(messages)
    assert caught.value.where == where
    assert str(caught.value).startswith(f"{where}: ")
    assert "\n" not in str(caught.value)


def test_consecutive_messages_of_one_role_join_with_a_blank_line():
    picture = {"type": "image", "url": "p"}
    merged = parse([USER, *user("a", picture), *user(picture, "b"), USER]).merged()
    (message,) = merged.messages
    assert message.parts == (TextPart("hi\n\na"), ImagePart("p"), ImagePart("p"), TextPart("b\n\nhi"))


def test_empty_texts_leave_no_blank_line_behind():
    empty = {"role": "user", "content": ""}
    assert parse([empty, USER, empty]).merged().messages[0].text == "hi"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_assistant_that_calls_tools_may_say_nothing(content):
    message = parse([USER, asks(call(), **content), answers("call_1")]).messages[1]
    assert message.text == "" and [(c.name, c.arguments) for c in message.tool_calls] == [("add", "{}")]


def test_arguments_are_json_text_however_they_are_given():
    text = '{ "a":"é" }'
    conversation = parse([USER, asks(call("1", arguments={"a": "é"}), call("2", arguments=text)), USER])
    first, second = conversation.messages[1].tool_calls
    assert (first.arguments, second.arguments) == ('{"a": "é"}', text)


def test_a_result_keeps_the_id_of_its_call_whatever_the_client_calls_it():
    turns = parse([USER, asks(call("call_1"), call("abc123XYZ")), answers("abc123XYZ"), answers("call_1")]).messages
    ids = [c.id for c in turns[1].tool_calls]
    assert ids[1] == "abc123XYZ" and len(set(ids)) == 2
    assert all(len(id) == 9 and id.isascii() and id.isalnum() for id in ids)
    assert [turn.call_id for turn in turns[2:]] == ids[::-1]
    assert parse([USER, asks(call("call_1")), USER]).messages[1].tool_calls[0].id == ids[0]


def test_results_of_tools_stay_apart_and_calls_of_joined_messages_add_up():
    turns = [USER, asks(call("1"), content="a"), asks(call("2"), content="b"), answers("1"), answers("2")]
    merged = parse(turns).merged().messages
    assert [turn.role for turn in merged] == ["user", "assistant", "tool", "tool"]
    assert len(merged[1].tool_calls) == 2 and merged[1].text == "a\n\nb"


def test_a_text_part_may_have_its_text_under_content_as_in_transformers_examples():
    assert parse(user({"type": "text", "content": "a"})).messages[0].parts == (TextPart("a"),)


@pytest.mark.parametrize("start", ["", "data:image/png;base64,"])
def test_a_picture_may_be_bare_base64(start):
    Image.new("RGB", (2, 1)).save(file := BytesIO(), "PNG")
    (picture,) = parse(user({"type": "image", "base64": start + b64encode(file.getvalue()).decode()})).images
    with media.opened(picture.source) as image:
        assert image.size == (2, 1)


@pytest.mark.parametrize("address", ["data:,x", "https://example.org/a.png", "HTTP://example.org", "file:///a.png"])
def test_an_address_has_no_blanks_around_it_and_the_name_of_a_file_keeps_its_own(address):
    parts = [{"type": "image_url", "image_url": {"url": source}} for source in (f" {address}\n", " a.png")]
    assert [picture.source for picture in parse(user(*parts)).images] == [address, " a.png"]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_a_name_changes_nothing_but_on_a_result(role):
    said, result = {"role": role, "content": "x"}, answers("1")
    plain = parse([USER, asks(call("1")), result, said, USER])
    assert parse([USER, asks(call("1")), result, said | {"name": "add"}, USER]) == plain
    assert parse([USER, asks(call("1")), result | {"name": "add"}]).messages[2].name == "add"


def test_a_system_message_alone_is_a_conversation():
    assert [turn.role for turn in parse([{"role": "system", "content": "x"}]).messages] == ["system"]


@pytest.mark.parametrize("prefix", [{}, {"prefix": True}])
def test_a_last_message_of_the_assistants_is_continued(prefix):
    conversation = parse([USER, {"role": "assistant", "content": "It is"} | prefix])
    assert conversation.is_continued and not parse([USER]).is_continued


def test_functions_are_the_older_form_of_calls_and_results():
    older = [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
        {"role": "function", "name": "add", "content": "3"},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": {"a": 1}}},
        {"role": "function", "name": "add", "content": "4"},
    ]
    turns = parse(older).messages
    first, second = (turn.tool_calls[0] for turn in turns if turn.tool_calls)
    assert (first.name, first.arguments, second.arguments) == ("add", "{}", '{"a": 1}') and first.id != second.id
    assert [turn.call_id for turn in turns if turn.role == "tool"] == [first.id, second.id]
    assert parse([*older, USER]).messages[:5] == turns  # the ids stay as the conversation grows


def test_of_a_call_in_both_forms_the_newer_counts():
    both = asks(call("abcdefgh1"), function_call={"name": "add", "arguments": "{}"})
    (made,) = parse([USER, both, answers("abcdefgh1")]).messages[1].tool_calls
    assert made.id == "abcdefgh1"


@pytest.mark.parametrize(
    "refused",
    [
        {"content": None, "refusal": "No."},
        {"refusal": "No."},
        {"content": "No.", "refusal": None},
        {"content": [{"type": "refusal", "refusal": "No."}]},
    ],
)
def test_a_refusal_sent_back_is_the_assistants_text(refused):
    assert parse([USER, {"role": "assistant", **refused}, USER]).messages[1].text == "No."


def test_tools_may_give_pictures():
    result = answers("1", [{"type": "image_url", "image_url": "a.png"}, {"type": "text", "text": "b"}])
    conversation = parse([USER, asks(call("1")), result, USER])
    assert conversation.images == [ImagePart("a.png")]
    assert conversation.images[0].where == "messages[2].content[0]"
    apart = conversation.images_after_results()
    assert [turn.role for turn in apart.messages] == ["user", "assistant", "tool", "user", "user"]
    assert apart.messages[2].parts == (TextPart("b"),) and apart.images == conversation.images


def test_a_conversation_that_was_parsed_is_taken_as_it_is():
    conversation = parse([USER])
    assert parse(conversation) is conversation


def test_a_long_conversation_takes_time_proportional_to_its_length():
    """Ten thousand messages are what a server lets in; each once copied all before it, and took minutes together."""
    messages = [{"role": "user", "content": "x" * 6000}] * 10_000
    begun = time.process_time()
    merged = parse(messages).merged()
    assert len(merged.messages[0].text) == 10_000 * 6002 - 2
    calls = [call(id=f"a{number:08}") for number in range(20_000)]
    parse([USER, asks(*calls), *[answers("a00000001")] * 5_000])
    assert time.process_time() - begun < 60
