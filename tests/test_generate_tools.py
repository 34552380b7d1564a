"""Tools and structured answers from end to end with the built-in model, which has learned neither."""

from __future__ import annotations

import json

import jsonschema
import pytest

from pixtral_cli import Pixtral
from pixtral_cli.errors import RequestError
from pixtral_cli.prompt.errors import InvalidTools
from pixtral_cli.prompt.tool_calls import joined

USER = {"role": "user", "content": "What is 1 + 2?"}
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "unit": {"enum": ["m", "é 何"]}},
    "required": ["a", "unit"],
    "additionalProperties": False,
}
NOTHING = {"properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "measure", "description": "Measures.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "parameters": NOTHING}},
]
MEASURE = {"type": "function", "function": {"name": "measure"}}
UNKNOWN = {"type": "function", "function": {"name": "other"}}
CALL = 9  # [TOOL_CALLS]


@pytest.fixture(scope="module")
def tiny():
    return Pixtral.load("tiny", devices="cpu")


def chat(tiny, **options):
    return tiny.chat([USER], **{"max_new_tokens": 400, **options})


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "seed": 1}, {"temperature": 2.0, "seed": 2}])
def test_a_named_function_is_called_once_with_arguments_by_its_schema(tiny, sampling):
    reply = chat(tiny, tools=TOOLS, tool_choice=MEASURE, **sampling)
    (call,) = reply.tool_calls
    assert (reply.finish_reason, reply.text, call.name) == ("tool_calls", "", "measure")
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    assert len(call.id) == 9 and call.id.isalnum()


@pytest.mark.parametrize("seed", range(2))
def test_required_calls_one_of_the_tools_and_only_one_where_parallel_calls_are_off(tiny, seed):
    options = {"tools": TOOLS, "tool_choice": "required", "temperature": 2.0, "seed": seed}
    (call,) = chat(tiny, parallel_tool_calls=False, **options).tool_calls
    assert call.name in ("measure", "now")
    several = chat(tiny, **options).tool_calls
    assert {call.name for call in several} <= {"measure", "now"}


def test_the_calls_come_with_the_last_event_and_are_those_of_the_reply(tiny):
    events = list(tiny.stream([USER], TOOLS, tool_choice=MEASURE, stop=["a", "{"]))
    assert all(not event.text and not event.tool_calls for event in events[:-1])
    assert events[-1].tool_calls == events[-1].reply.tool_calls != ()
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["tool_calls"]


def test_a_call_is_streamed_as_it_is_written_and_its_pieces_are_the_call_of_the_reply(tiny):
    events = list(tiny.stream([USER], TOOLS, tool_choice="required", temperature=2.0, seed=3, max_new_tokens=400))
    assert joined(delta for event in events for delta in event.tool_call_deltas) == events[-1].tool_calls
    assert sum(bool(event.tool_call_deltas) for event in events) > 3


@pytest.mark.parametrize("choice", [MEASURE, "required"])
def test_of_a_call_that_is_cut_off_there_is_what_was_written_and_no_text(tiny, choice):
    whole = chat(tiny, tools=TOOLS, tool_choice=choice)
    length = len(whole.token_ids)
    for most in (1, 5, length // 2, length - 5):
        reply = chat(tiny, tools=TOOLS, tool_choice=choice, max_new_tokens=most)
        assert (reply.finish_reason, reply.text) == ("length", "")
        begun = [call.arguments for call in reply.tool_calls]
        expected = [call.arguments for call in whole.tool_calls[: len(begun)]]
        assert begun[:-1] == expected[:-1] and "".join(expected).startswith("".join(begun))
    assert reply.tool_calls[0].name == whole.tool_calls[0].name


def test_a_call_that_the_model_began_by_itself_and_that_is_cut_off_is_no_text_either(tiny):
    options = {"tools": TOOLS, "logit_bias": {CALL: 100.0}, "parallel_tool_calls": False}
    reply = chat(tiny, max_new_tokens=12, **options)
    assert (reply.finish_reason, reply.text) == ("length", "") and reply.token_ids[0] == CALL


def test_a_model_that_is_free_to_call_answers_as_without_and_its_own_calls_keep_to_the_tools(tiny):
    free = chat(tiny, tools=TOOLS, tool_choice="auto")
    assert free.tool_calls == () and free.text and free.finish_reason == "stop"
    tempted = chat(tiny, tools=TOOLS, logit_bias={CALL: 100.0}, max_new_tokens=400, parallel_tool_calls=False)
    (call,) = tempted.tool_calls
    assert call.name in ("measure", "now") and tempted.finish_reason == "tool_calls"


def test_none_never_calls_however_tempted(tiny):
    reply = chat(tiny, tools=TOOLS, tool_choice="none", logit_bias={CALL: 100.0}, max_new_tokens=20)
    assert CALL not in reply.token_ids and reply.tool_calls == ()


def test_the_tools_are_in_the_prompt_whatever_the_choice(tiny):
    def prompt(**options):
        return chat(tiny, max_new_tokens=1, **options).prompt_token_ids

    assert prompt(tools=TOOLS) == prompt(tools=TOOLS, tool_choice="none") != prompt()


def test_a_conversation_goes_on_after_a_call_and_its_result(tiny):
    (call,) = chat(tiny, tools=TOOLS, tool_choice=MEASURE).tool_calls
    function = {"name": call.name, "arguments": call.arguments}
    turns = [USER, {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]}]
    turns.append({"role": "tool", "tool_call_id": call.id, "content": "3 m"})
    assert tiny.chat(turns, TOOLS, max_new_tokens=5).token_ids


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}])
def test_an_answer_keeps_to_its_schema_strict_or_not(tiny, sampling):
    described = {"name": "x", "schema": PARAMETERS}
    for strict in ({}, {"strict": True}):
        reply = chat(tiny, response_format={"type": "json_schema", "json_schema": {**described, **strict}}, **sampling)
        jsonschema.validate(json.loads(reply.text), PARAMETERS)
        assert reply.finish_reason == "stop"


def test_json_object_gives_an_object_and_text_gives_text(tiny):
    end = {tiny.processor.tokenizer.encode(mark)[0]: 40.0 for mark in ('"', "}")}
    reply = chat(tiny, response_format={"type": "json_object"}, logit_bias=end)
    assert isinstance(json.loads(reply.text), dict) and reply.finish_reason == "stop"
    assert chat(tiny, response_format={"type": "text"}).token_ids == chat(tiny).token_ids


def test_an_answer_by_a_schema_may_be_a_call_instead(tiny):
    asked = {"type": "json_schema", "json_schema": {"schema": {"const": 3}}}
    assert chat(tiny, tools=TOOLS, response_format=asked, tool_choice="none").text == "3"
    tempted = chat(tiny, tools=TOOLS, response_format=asked, logit_bias={CALL: 100.0}, parallel_tool_calls=False)
    assert tempted.tool_calls or tempted.text == "3"
    assert len(chat(tiny, tools=TOOLS, response_format=asked, tool_choice=MEASURE).tool_calls) == 1


def test_penalties_and_bias_change_the_answer_and_a_bias_can_end_it(tiny):
    plain = chat(tiny).token_ids
    assert chat(tiny, logit_bias={"2": 100}).token_ids == [2]
    on_and_on = {"ignore_eos": True, "max_new_tokens": 60}
    for penalty in ("frequency_penalty", "presence_penalty"):
        assert chat(tiny, **{penalty: 2.0}, **on_and_on).token_ids != chat(tiny, **on_and_on).token_ids
    assert chat(tiny, frequency_penalty=0.0, presence_penalty=0.0, logit_bias={}).token_ids == plain


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": "high"}, "presence_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": {10**9: 1}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": ["auto"]}, "tool_choice"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": UNKNOWN}, "other"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)
def test_what_is_wrong_is_named(tiny, options, named):
    with pytest.raises(RequestError, match=named):
        chat(tiny, **options)


def test_a_schema_that_cannot_be_kept_to_matters_only_to_calls_that_must_keep_to_it(tiny):
    unknown = {"name": "odd", "parameters": {"properties": {"a": {"not": {}}}}}
    assert chat(tiny, tools=[{"function": unknown}], max_new_tokens=5).token_ids
    for must in ({"tool_choice": "required"}, {"tools": [{"function": unknown | {"strict": True}}]}):
        with pytest.raises(RequestError, match=r"^tools .*not"):
            chat(tiny, **{"tools": [{"function": unknown}], **must})


def test_tools_that_are_none_are_named(tiny):
    with pytest.raises(InvalidTools, match=r"^tools\[0\]"):
        chat(tiny, tools=[{"type": "function"}])


def test_each_of_several_conversations_keeps_to_its_schema(tiny):
    asked = {"type": "json_schema", "json_schema": {"schema": PARAMETERS}}
    for reply in tiny.chat_batch([[USER]] * 3, response_format=asked, temperature=1.5):
        jsonschema.validate(json.loads(reply.text), PARAMETERS)
