"""Every form of messages that real clients send is answered; what changes nothing makes the same prompt."""

import pytest

SQUARE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAACAAAAAQCAIAAAD4YuoOAAAAHklEQVR4nGP8"
    "z0BbwERj80ctGLVg1IJRC0YtoAoAAHBbAR/iw2C0AAAAAElFTkSuQmCC"
)
"""A PNG of 32x16 pixels, which are 2 patches and an end."""
PICTURE = {"type": "image_url", "image_url": {"url": SQUARE}}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is 1 + 2?"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"}
SAID = {"role": "assistant", "content": "Three, or"}


def tokens(http, messages):
    """Those of the prompt; an answer to it is charged for as many."""
    answer = http.post("/tokenize", json={"messages": messages})
    assert answer.status_code == 200, answer.text
    body = {"model": "tiny", "messages": messages, "max_tokens": 1}
    asked = http.post("/v1/chat/completions", json=body)
    assert asked.status_code == 200, asked.text
    assert asked.json()["usage"]["prompt_tokens"] == len(answer.json()["tokens"])
    return answer.json()["tokens"]


CONVERSATION = [SYSTEM, USER, CALLED, RESULT, SAID, USER]


@pytest.mark.parametrize("place", range(len(CONVERSATION)))
@pytest.mark.parametrize("more", [{"name": "somebody"}, {"cache_control": {"type": "ephemeral"}}])
def test_names_and_marks_for_caches_change_no_prompt(http, place, more):
    marked = [message | more if index == place else message for index, message in enumerate(CONVERSATION)]
    if "name" not in more or CONVERSATION[place]["role"] != "tool":  # there the name is the function's
        assert tokens(http, marked) == tokens(http, CONVERSATION)


def test_parts_that_are_marked_for_a_cache_are_as_others(http):
    parts = [{"type": "text", "text": "What is this?"}, PICTURE]
    marked = [part | {"cache_control": {"type": "ephemeral"}} for part in parts]
    asked = [tokens(http, [{"role": "user", "content": content}]) for content in (parts, marked)]
    assert asked[0] == asked[1]


def test_a_system_message_alone_is_answered(http):
    assert tokens(http, [SYSTEM])


def test_a_last_message_of_the_assistants_is_continued_prefix_or_not(http):
    asked, begun = tokens(http, [USER]), tokens(http, [USER, SAID])
    assert begun == tokens(http, [USER, SAID | {"prefix": True}])
    assert begun[: len(asked)] == asked
    text = http.post("/detokenize", json={"tokens": begun[len(asked) :]}).json()["prompt"]
    assert text.strip() == SAID["content"]


def test_pictures_in_the_result_of_a_tool_are_seen(http):
    messages = [USER, CALLED, RESULT | {"content": [{"type": "text", "text": "Look:"}, PICTURE]}]
    answer = http.post("/tokenize", json={"messages": messages}).json()
    assert answer["images"] == [{"width": 32, "height": 16, "tokens": 3}]
    assert len(tokens(http, messages)) == answer["count"]


def test_function_calls_and_their_results_are_as_those_of_tools(http):
    """But for the id, which the older form does not have."""
    older = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    result = {"role": "function", "name": "add", "content": "3"}
    newer = tokens(http, [USER, CALLED, RESULT | {"name": "add"}])
    assert abs(len(tokens(http, [USER, older, result])) - len(newer)) < 20


def test_a_function_may_give_nothing(http):
    older = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    nothing = {"role": "function", "name": "add", "content": None}
    assert len(tokens(http, [USER, older, nothing])) == len(tokens(http, [USER, older, nothing | {"content": ""}]))


@pytest.mark.parametrize("content", [None, [{"type": "refusal", "refusal": "I will not."}]])
def test_a_refusal_that_is_sent_back_is_what_was_said(http, content):
    refused = {"role": "assistant", "content": content, "refusal": "I will not."}
    said = {"role": "assistant", "content": "I will not."}
    assert tokens(http, [USER, refused, USER]) == tokens(http, [USER, said, USER])
