"""Thoughts and settings in templates: those that mistral-common generates for its versions, and others' forms."""

from __future__ import annotations

import pytest
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from support.prompts import chat_ids
from support.tool_builders import EFFORTS, SETTINGS, call, numbered_tekken
from transformers.utils.chat_template_utils import render_jinja_template

from pixtral_cli.prompt.errors import TemplateFailed
from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.mistral_format import MistralFormat
from pixtral_cli.prompt.model_settings import ModelSettings
from pixtral_cli.prompt.template import ChatTemplate
from pixtral_cli.prompt.tokenizer_files import load

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": ["[INST]"]}}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
USER = {"role": "user", "content": "What [THINK] is it?"}
THINKING = {"type": "thinking", "thinking": "I [/THINK] see."}
SAID = {"type": "text", "text": "3"}
CHATS = {
    "parts": [USER, {"role": "assistant", "content": [THINKING, SAID]}, USER],
    "a field": [USER, {"role": "assistant", "content": "3", "reasoning_content": "I <think> see."}, USER],
    "a call": [
        USER,
        {"role": "assistant", "content": [THINKING], "tool_calls": [call("abcdefgh1")]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": "3"},
    ],
    "no thought": [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "3"}, USER],
}


def template_of(version, **changes):
    fields = {"model_settings_fields": frozenset(SETTINGS), "reasoning_effort_values": EFFORTS}
    settings = fields | {"reasoning_effort_default": "none"} if version == 15 else dict.fromkeys(fields)
    settings.setdefault("reasoning_effort_default", None)
    return generate_chat_template(
        spm=False,
        tokenizer_version=TokenizerVersion(f"v{version}"),
        image_support=True,
        audio_support=False,
        thinking_support=version > 11,
        plain_thinking_support=version == 11,
        default_system_prompt=None,
        use_special_token_variables=True,
        **settings,
        **changes,
    )


@pytest.fixture(scope="module")
def made(tekken_file, tmp_path_factory):
    """Version -> our tokenizer and Mistral's."""
    paths = {v: numbered_tekken(tekken_file, tmp_path_factory.mktemp(f"v{v}"), v) for v in (11, 13, 15)}
    return {v: (load({"tekken.json": path}.get), MistralTokenizer.from_file(str(path))) for v, path in paths.items()}


@pytest.mark.parametrize("version", [13, 15])
@pytest.mark.parametrize("name", CHATS)
def test_ids_by_mistrals_templates_are_those_of_its_tokenizers(made, version, name):
    ours, theirs = made[version]
    expected = theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages=CHATS[name])).tokens
    assert chat_ids(ChatTemplate(template_of(version), ours), CHATS[name]) == expected


@pytest.mark.parametrize("asked", [{"reasoning_effort": "high"}, {"response_format": FORM}])
def test_templates_are_given_the_settings(made, asked):
    ours, theirs = made[15]
    expected = theirs.encode_chat_completion(ChatCompletionRequest.from_openai(messages=[USER], **asked)).tokens
    encoded = ChatTemplate(template_of(15), ours).encode(parse([USER]), (), ModelSettings(**asked))
    assert encoded == expected


def test_an_effort_that_a_template_refuses_is_told_in_its_words(made):
    with pytest.raises(TemplateFailed, match='reasoning_effort must be either "none" or "high"'):
        ChatTemplate(template_of(15), made[15][0]).encode(parse([USER]), (), ModelSettings("low"))


@pytest.mark.parametrize("name", CHATS)
def test_thoughts_in_text_are_those_of_mistrals_template_by_rules_and_by_template(made, name):
    """As for the first Magistrals; transformers renders the template, and no message has a control string of V11."""
    ours, theirs = made[11]
    shown = {"role": "system", "content": "Think in <think>.</think>"}
    messages = [shown, *(m for m in CHATS[name] if m["role"] != "system")]
    (rendered,), _ = render_jinja_template([messages], chat_template=template_of(11), bos_token="<s>", eos_token="</s>")
    expected = ours.encode_with_controls(ours.split_controls(rendered))
    assert chat_ids(ChatTemplate(template_of(11), ours), messages) == expected
    assert chat_ids(MistralFormat(ours), messages) == expected
    assert theirs.instruct_tokenizer.tokenizer.decode(expected, special_token_policy="keep") == rendered


QWEN = (
    "{% for m in messages %}[INST]{{ m.role }}:{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% endfor %}[/INST]"
)
STRINGS = "{% for m in messages %}[INST]{{ m.content }}{% endfor %}[/INST]"


def test_a_template_may_read_the_field_and_one_that_reads_nothing_gets_the_text_between_its_marks(made):
    ours = made[13][0]

    def shown(template, messages):
        return "".join(map(ours.label, chat_ids(ChatTemplate(template, ours), messages)))

    thought = [USER | {"content": "a"}, {"role": "assistant", "content": "3", "reasoning_content": "Hm [/THINK]."}]
    more = [*thought, USER | {"content": "b"}]
    assert shown(QWEN, more) == "[INST]user:a[INST]assistant:<think>Hm [/THINK].</think>3[INST]user:b[/INST]"
    assert shown(STRINGS, more) == "[INST]a[INST][THINK]Hm [/THINK].[/THINK]3[INST]b[/INST]"
    ids = chat_ids(ChatTemplate(STRINGS, ours), more)
    assert ids.count(ours.control("[/THINK]")) == 1  # the other is the user's text


def test_an_open_thought_is_continued(made):
    ours = made[13][0]
    messages = [USER, {"role": "assistant", "content": [THINKING | {"closed": False}]}]
    for template in (template_of(13), STRINGS):
        ids = chat_ids(ChatTemplate(template, ours), messages)
        assert ids[-1] != ours.control("[/THINK]") and ours.control("[THINK]") in ids
        assert ChatTemplate(template, ours).thought_marks(parse(messages)).are_open(ids, ours)
