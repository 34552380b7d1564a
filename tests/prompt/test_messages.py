"""OpenAI-style messages are read, and a wrong entry is named."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pixtral_cli.prompt.errors import InvalidMessages
from pixtral_cli.prompt.messages import Conversation, Message, Picture, Text, parse

USER = {"role": "user", "content": "hi"}


def user(*content):
    return [{"role": "user", "content": list(content)}]


def test_a_string_is_one_text():
    assert parse([USER]) == Conversation((Message("user", (Text("hi"),), is_string=True),))


def test_developer_is_another_word_for_system():
    assert parse([{"role": "developer", "content": "x"}, USER]).messages[0].role == "system"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
    ],
)
def test_every_way_to_name_a_picture_gives_its_source(part):
    assert parse(user({"type": "text", "text": "x"}, part)).messages[0].chunks == (Text("x"), Picture("a.png"))


def test_a_pil_image_is_a_picture():
    image = Image.new("RGB", (1, 1))
    assert parse(user({"type": "image", "image": image})).pictures == [Picture(image)]


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
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{}]}, USER], "messages[1]"),
        ([USER, {"role": "assistant", "content": "x"}], "messages[1]"),
        ([{"role": "system", "content": "x"}], "messages"),
        ([{"role": "system", "content": [{"type": "image", "url": "x"}]}, USER], "messages[0]"),
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
    assert message.chunks == (Text("hi\n\na"), Picture("p"), Picture("p"), Text("b\n\nhi"))


def test_empty_texts_leave_no_blank_line_behind():
    empty = {"role": "user", "content": ""}
    assert parse([empty, USER, empty]).merged().messages[0].text == "hi"
