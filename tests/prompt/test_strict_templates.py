"""Templates that demand strict turns, of the kinds that are published, get the empty turns that they want."""

from __future__ import annotations

import pytest
from support.prompts import chat_ids
from support.tool_builders import call
from transformers import PreTrainedTokenizerFast

from pixtral_cli.prompt.errors import TemplateFailed
from pixtral_cli.prompt.template import ChatTemplate
from pixtral_cli.prompt.tokenizer_files import load as load_tokenizer

SAYS = "{{ raise_exception('roles must alternate') }}"
BODY = """\
{%- for m in turns -%}
    {%- if m.role == "user" -%}[INST]{{ system if loop.last }}{{ m.content }}[/INST]
    {%- elif m.role == "tool" -%}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]
    {%- elif m.tool_calls -%}{{ m.content }}[TOOL_CALLS]{{ m.tool_calls[0].function.name }}{{ eos_token }}
    {%- elif m.role == "assistant" -%}{{ m.content + eos_token }}
    {%- else -%}{{ raise_exception("only the first message may be the system's") }}{%- endif -%}
{%- endfor -%}"""
SYSTEM_APART = """\
{%- set system = "" -%}{%- set turns = messages -%}
{%- if messages[0].role == "system" -%}
    {%- set system = messages[0].content -%}{%- set turns = messages[1:] -%}
{%- endif -%}"""
COUNTED = "{%- set n = namespace(i=0) -%}{%- for m in turns -%}{%- if COUNTS -%}" + (
    "{%- if (m.role == 'user') != (n.i % 2 == 0) -%}" + SAYS + "{%- endif -%}{%- set n.i = n.i + 1 -%}"
) + "{%- endif -%}{%- endfor -%}"  # fmt: skip
NOT_A_CALL = "not (m.role == 'tool' or (m.tool_calls is defined and m.tool_calls is not none))"
NEMO = SYSTEM_APART + COUNTED.replace("COUNTS", NOT_A_CALL) + BODY
SPOKEN = "m.role == 'user' or (m.role == 'assistant' and (m.tool_calls is not defined or m.tool_calls | length == 0))"
MINISTRAL = SYSTEM_APART + COUNTED.replace("COUNTS", SPOKEN) + BODY
SPEAKING = NEMO.replace(
    '{%- if m.role == "user" -%}[INST]',
    "{%- if not m.content and not m.tool_calls -%}{{ raise_exception('every turn says something') }}{%- endif -%}"
    '{%- if m.role == "user" -%}[INST]',
)
SEVEN_B = "{%- set turns = messages -%}{%- set system = '' -%}" + COUNTED.replace("COUNTS", "true") + BODY
NO_SYSTEM = "{%- set turns = messages -%}{%- set system = '' -%}" + COUNTED.replace("COUNTS", NOT_A_CALL) + BODY

W, STOP = {"role": "user", "content": "w"}, {"role": "user", "content": "stop"}
OK = {"role": "assistant", "content": "ok"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [call("abcdefghi", "now", "{}")]}
SUNNY = {"role": "tool", "tool_call_id": "abcdefghi", "content": "Sunny"}
SYSTEM = {"role": "system", "content": "S"}
EMPTY = {"role": "assistant", "content": ""}
WANTED = {
    "a denied call": ([W, CALLS, STOP], [W, CALLS, EMPTY, STOP]),
    "a user after a result": ([W, CALLS, SUNNY, STOP], [W, CALLS, SUNNY, EMPTY, STOP]),
    "twice": ([SYSTEM, W, CALLS, STOP, CALLS, SUNNY, W], [SYSTEM, W, CALLS, EMPTY, STOP, CALLS, SUNNY, EMPTY, W]),
    "an answer first": ([OK, W], [{"role": "user", "content": ""}, OK, W]),
    "a call first": ([CALLS, SUNNY, STOP], [CALLS, SUNNY, STOP]),
    "a system text in the middle": ([W, SYSTEM, CALLS, STOP], [SYSTEM, W, CALLS, EMPTY, STOP]),
    "nothing amiss": ([W, CALLS, SUNNY, OK, STOP], [W, CALLS, SUNNY, OK, STOP]),
}


@pytest.fixture
def ids(byte_level_json):
    def made(template, messages):
        return chat_ids(ChatTemplate(template, load_tokenizer({"tokenizer.json": byte_level_json}.get)), messages)

    return made


@pytest.fixture
def theirs(byte_level_json):
    def made(template, messages):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(byte_level_json), bos_token="<s>", eos_token="</s>")
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return made


@pytest.mark.parametrize("template", [NEMO, MINISTRAL], ids=["nemo", "ministral"])
@pytest.mark.parametrize("name", WANTED)
def test_an_empty_turn_stands_where_the_template_wants_one(ids, theirs, template, name):
    given, wanted = WANTED[name]
    assert ids(template, given) == theirs(template, wanted)


def test_a_turn_that_must_say_something_says_a_space(ids, theirs):
    space = {"role": "assistant", "content": " "}
    assert ids(SPEAKING, [W, CALLS, STOP]) == theirs(SPEAKING, [W, CALLS, space, STOP])


@pytest.mark.parametrize("template", [SEVEN_B, NO_SYSTEM], ids=["7b", "with calls"])
def test_a_system_text_goes_into_the_last_user_turn_where_there_is_no_system_role(ids, theirs, template):
    expected = theirs(template, [W, OK, {"role": "user", "content": "S\n\nstop"}])
    assert ids(template, [SYSTEM, W, OK, STOP]) == expected


def test_what_no_arrangement_mends_is_told_in_the_templates_words(ids):
    with pytest.raises(TemplateFailed, match="roles must alternate"):
        ids(SEVEN_B, [W, CALLS, SUNNY, STOP])


def test_images_of_a_result_follow_it_in_a_turn_of_the_users(byte_level_json):
    template = NEMO.replace("{{ m.content }}[/INST]", "{{ m.content if m.content is string else '[IMG]' }}[/INST]")
    template = template.replace("is string", "is string and m.content[0].type != 'image'")
    tokenizer = load_tokenizer({"tokenizer.json": byte_level_json}.get)
    shown = SUNNY | {"content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "a.png"}]}
    ids = chat_ids(ChatTemplate(template, tokenizer), [W, CALLS, shown])
    text = tokenizer.encode
    assert ids[-8:] == [9, *text("now"), 2, 7, *text("a"), 8, 2, 3, 10, 4][-8:]
