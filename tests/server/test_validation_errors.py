"""Of all that pydantic has against a body, the one field that is meant is named, in a short sentence."""

import pytest

from pixtral_cli.server.errors import ApiError
from pixtral_cli.server.request_body import validated
from pixtral_cli.server.request_schemas import ChatRequest, CompletionRequest

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "m", "messages": HELLO}
COMPLETION = {"model": "m", "prompt": "Hello"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def refused(model, body):
    with pytest.raises(ApiError) as caught:
        validated(model, body)
    assert caught.value.status == 400
    return caught.value


def test_what_is_missing_is_named():
    assert refused(ChatRequest, {"model": "m"}).param == "messages"
    assert refused(ChatRequest, {"messages": HELLO}).param == "model"
    assert refused(CompletionRequest, {"model": "m"}).param == "prompt"
    assert refused(ChatRequest, {"model": "m", "messages": [{"role": "tool", "content": "3"}]}).param == (
        "messages[0].tool_call_id"
    )


def test_an_error_is_about_the_innermost_thing_that_is_wrong():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": 5}}]
    assert (
        refused(ChatRequest, CHAT | {"messages": [{"role": "user", "content": parts}]}).param
        == "messages[0].content[1].image_url.url"
    )
    assert refused(CompletionRequest, COMPLETION | {"prompt": [[1, 2], [3, "x"]]}).param == "prompt[1][1]"
    assert refused(ChatRequest, CHAT | {"messages": [{"role": "robot", "content": "a"}]}).param == "messages[0].role"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ["a"] * 65}, "prompt", "at most 64 items"),
        ({"prompt": [[1]] * 65}, "prompt", "at most 64 items"),
        ({"prompt": ["a", 1]}, "prompt[1]", "a valid string"),
        ({"prompt": [1, 2, "a"]}, "prompt[2]", "a valid integer"),
        ({"prompt": [[1], [-2]]}, "prompt[1][0]", "greater than or equal to 0"),
        ({"prompt": 5}, "prompt", "a valid string or be a valid list"),
        ({"stop": "a" * 501}, "stop", "at most 500 characters"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
    ],
)
def test_of_the_forms_that_a_value_may_have_the_one_that_was_meant_is_named(fields, param, words):
    error = refused(CompletionRequest, COMPLETION | fields)
    assert error.param == param and error.message == f"{param} should {error.message.partition(' should ')[2]}"
    assert error.message.endswith(f"{words}.") and " or " not in error.message.removesuffix(f"{words}.")


def test_texts_of_parts_are_named_however_many_are_wrong():
    parts = [{"type": "text", "text": 5}, {"type": "text", "text": 6}]
    assert (
        refused(ChatRequest, CHAT | {"messages": [{"role": "user", "content": parts}]}).param
        == "messages[0].content[0].text"
    )


def test_a_strangers_text_is_not_echoed_at_length():
    error = refused(ChatRequest, CHAT | {"x" * 10_000: 1})
    assert len(error.message) < 200 and len(error.param) < 200


def test_a_tool_is_chosen_by_a_name_that_a_tool_can_have():
    choice = {"type": "function", "function": {"name": "x" * 100_000}}
    error = refused(ChatRequest, CHAT | {"tools": [TOOL], "tool_choice": choice})
    assert error.param == "tool_choice.function.name" and len(error.message) < 200
