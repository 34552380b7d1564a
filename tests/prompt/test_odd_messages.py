"""Whatever JSON comes as messages: a prompt, or a sentence that says what is wrong; never anything else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.prompts import chat_ids

from pixtral_cli.prompt.errors import InvalidMessages, InvalidTools, PromptError, TemplateFailed
from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.mistral_format import MistralFormat
from pixtral_cli.prompt.template import ChatTemplate
from pixtral_cli.prompt.tokenizer_files import load as load_tokenizer
from pixtral_cli.prompt.tools import parse_tools

DEEP = '{"a":' * 900 + "1" + "}" * 900
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ids = st.sampled_from(["1", "abcdefghi", ""]) | json_values
names = st.sampled_from(["add", ""]) | json_values
written = st.sampled_from(["{", DEEP]) | json_values
functions = st.fixed_dictionaries({}, optional={"name": names, "arguments": written})
kinds = st.just("function") | json_values
calls = st.fixed_dictionaries({}, optional={"id": ids, "type": kinds, "function": functions})
parts = json_values | st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", "refusal"]) | json_values},
    optional=dict.fromkeys(("text", "content", "url", "image_url", "base64", "refusal"), json_values | st.just("a")),
)
odd_messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "function"]) | json_values},
    optional={
        "content": st.text(max_size=3) | st.lists(parts, max_size=3) | st.sampled_from([DEEP]) | json_values,
        "tool_calls": st.lists(calls, max_size=2) | json_values,
        "function_call": functions | json_values,
        "tool_call_id": ids,
        "name": st.just("add") | json_values,
        "refusal": json_values,
        "prefix": json_values,
    },
)


@pytest.fixture(scope="session")
def formats(byte_level_json):
    """Mistral's rules of four versions, and a template that writes all that there is."""
    tokenizer = load_tokenizer({"tokenizer.json": byte_level_json}.get)
    rules = [MistralFormat(replace(tokenizer, version=version)) for version in (3, 7, 13, 15)]
    return [*rules, ChatTemplate("{{ bos_token }}{{ messages | tojson }}", tokenizer)]


@given(messages=st.lists(odd_messages, max_size=4) | json_values)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_json_comes_there_is_a_prompt_or_a_sentence(formats, messages):
    try:
        conversation = parse(messages)
    except PromptError as error:
        assert "\n" not in str(error) and error.hint
        return
    for chat_format in formats:
        try:
            assert chat_ids(chat_format, conversation)
        except TemplateFailed as error:
            assert error.hint


@pytest.mark.parametrize("deep", [DEEP, json.loads(DEEP)])
def test_what_is_nested_without_end_is_text_or_refused(formats, deep):
    call = {"id": "1", "function": {"name": "add", "arguments": deep}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "1", "content": DEEP})
    if isinstance(deep, dict):
        with pytest.raises(InvalidMessages, match="arguments"):
            parse(messages)
        with pytest.raises(InvalidTools, match="parameters"):
            parse_tools([{"function": {"name": "add", "parameters": deep}}])
        return
    for chat_format in formats:
        assert chat_ids(chat_format, messages)
