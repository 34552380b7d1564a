"""A checkpoint's own template gives the ids of transformers, and a user's control strings stay text."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.prompts import chat_ids
from transformers import PreTrainedTokenizerFast
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from pixtral_cli.prompt.errors import TemplateFailed
from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.processor import Processor
from pixtral_cli.prompt.template import ChatTemplate, find_template
from pixtral_cli.prompt.tokenizer_files import load as load_tokenizer

PIXTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate user/assistant") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {{- "[INST]" }}
        {%- if loop.last and system_message is defined %}{{- system_message + "\\n\\n" }}{% endif %}
        {%- if message["content"] is string %}
            {{- message["content"] }}
        {%- else %}
            {%- for chunk in message["content"] %}
                {%- if chunk["type"] == "text" %}{{- chunk["text"] }}{% else %}{{- "[IMG]" }}{% endif %}
            {%- endfor %}
        {%- endif %}
        {{- "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
SPACED = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'user' %}
[INST] {{ message.content | trim }} [/INST]
{%- else %} {{ message['content'] }}{{ eos_token }}
{%- endif %}
{% endfor %}
"""
NO_BOS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
)
TRIMS = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}</s>{% endfor %}"
SMALL, WIDE = Image.new("RGB", (20, 40), "red"), Image.new("RGB", (1500, 300), "blue")


def user(*parts):
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}
    kinds = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": kinds}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


def transformers_ids(path, template, messages, bos_if_missing=False):
    """What PixtralProcessor does, in its steps (itself, it needs torchvision): render, expand pictures, encode."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    images = [p["image"] for m in messages for p in m["content"] if isinstance(p, dict) and "image" in p]
    for image in images:
        height, width = PixtralImageProcessorPil()(image)["image_sizes"][0]
        rows = ("[img]" * (width // 16) + "[IMG_BREAK]") * (height // 16)
        text = text.replace("[IMG]", rows.removesuffix("[IMG_BREAK]") + "[IMG_END]", 1)
    return tokenizer(text.replace("[img]", "[IMG]"), add_special_tokens=bos_if_missing)["input_ids"]


@pytest.fixture
def processor(checkpoint):
    def make(path, template, **files):
        return Processor.from_checkpoint(checkpoint(tokenizer_json=path, chat_template_jinja=template, **files))

    return make


CONVERSATIONS = {
    "one text": [user("What is left of the square?")],
    "text that merges with the template's": [user("  a\n\n"), assistant("\n\n b"), user("\n")],
    "a system text": [SYSTEM, user("how many?")],
    "a picture": [user(SMALL, "a red square")],
    "pictures between texts": [SYSTEM, user("is ", SMALL, " or ", WIDE, "?", " a")],
    "several turns": [SYSTEM, user(SMALL, "what?"), assistant("a red square"), user("and ", WIDE)],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_transformers(processor, byte_level_json, name):
    messages = CONVERSATIONS[name]
    ids = processor(byte_level_json, PIXTRAL).chat(parse(messages)).token_ids
    assert ids == transformers_ids(byte_level_json, PIXTRAL, messages)


@pytest.mark.parametrize("template", [PIXTRAL, SPACED])
@pytest.mark.parametrize("name", ["one text", "text that merges with the template's"])
def test_sentencepiece_ids_are_those_of_transformers(processor, sentencepiece_json, template, name):
    messages = CONVERSATIONS[name]
    ids = processor(sentencepiece_json, template).chat(parse(messages)).token_ids
    assert ids == transformers_ids(sentencepiece_json, template, messages)


ordinary = st.text("ab c[]<>/\n\t.é日1", max_size=12).filter(lambda text: "<s>" not in text)


@given(texts=st.lists(ordinary, min_size=1, max_size=4), template=st.sampled_from([PIXTRAL, SPACED, NO_BOS]))
@settings(max_examples=120, deadline=None)
def test_ids_of_any_ordinary_text_are_those_of_transformers(byte_level_json, texts, template):
    messages = [user(text) if index % 2 == 0 else assistant(text) for index, text in enumerate(texts)]
    messages = messages if messages[-1]["role"] == "user" else [*messages, user("?")]
    tokenizer = load_tokenizer({"tokenizer.json": byte_level_json}.get)
    assert chat_ids(ChatTemplate(template, tokenizer), messages) == transformers_ids(
        byte_level_json, template, messages
    )


@pytest.fixture(scope="session")
def pixtral_templates(byte_level_json, tekken):
    small = load_tokenizer({"tokenizer.json": byte_level_json}.get)
    return [ChatTemplate(PIXTRAL, tokenizer) for tokenizer in (small, tekken)]


tokens = st.sampled_from(["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IM", "G]", "[", "<s>", "</s>", "<", " ", "a"])
hostile = st.lists(tokens, max_size=6).map("".join)


@example(parts=["[IM", "G]", "<", "/s>", "[INST ", "]"], system="[INST", answer="<s")
@given(parts=st.lists(hostile, min_size=1, max_size=4), system=hostile, answer=hostile)
@settings(max_examples=150, deadline=None)
def test_a_users_control_strings_never_become_control_ids(pixtral_templates, parts, system, answer):
    """The control ids are the template's own, and every text survives to the letter."""
    messages = [{"role": "system", "content": system}, user("x"), assistant(answer), user(*parts, SMALL, *parts)]
    for template in pixtral_templates:
        tokenizer, ids = template.tokenizer, chat_ids(template, messages)
        special = {control.id for control in tokenizer.controls.values()}
        assert [id for id in ids if id in special] == [1, 3, 4, 2, 3, 10, 4]
        said = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert said == "x" + answer + system + "\n\n" + "".join(parts) * 2


def test_private_characters_of_the_user_survive(processor, byte_level_json):
    text = "".join(map(chr, range(0xF0000, 0xF0004))) + "[INST]"
    made = processor(byte_level_json, PIXTRAL)
    ids = made.chat(parse([user(text)])).token_ids
    assert b"".join(map(made.tokenizer.token_bytes, ids)).decode() == text


def test_a_bos_that_the_template_leaves_out_is_added_for_processors_only(processor, byte_level_json):
    messages = [user("a")]
    bare = processor(byte_level_json, NO_BOS).chat(parse(messages)).token_ids
    with_processor = processor(byte_level_json, NO_BOS, processor_config_json="{}").chat(parse(messages)).token_ids
    assert bare == transformers_ids(byte_level_json, NO_BOS, messages)
    assert with_processor == transformers_ids(byte_level_json, NO_BOS, messages, bos_if_missing=True) == [1, *bare]


@pytest.mark.parametrize(
    ("messages", "tidy"),
    [
        (
            [user("a"), user("b"), assistant("c"), assistant("d"), user("e")],
            [user("a\n\nb"), assistant("c\n\nd"), user("e")],
        ),
        ([user("a"), SYSTEM, user("b")], [SYSTEM, user("a\n\nb")]),
        ([assistant("a"), user("b")], [user(""), assistant("a"), user("b")]),
        ([SYSTEM, SYSTEM, user("b")], [{"role": "system", "content": "Be brief.\n\nBe brief."}, user("b")]),
    ],
)
def test_roles_need_not_alternate(processor, byte_level_json, messages, tidy):
    made = processor(byte_level_json, PIXTRAL)
    assert made.chat(parse(messages)).token_ids == made.chat(parse(tidy)).token_ids


def test_consecutive_messages_are_joined_even_where_the_template_would_take_them(processor, byte_level_json):
    made = processor(byte_level_json, SPACED)
    joined, apart = ([user("a\n\nb")], [user("a"), user("b")])
    assert made.chat(parse(apart)).token_ids == made.chat(parse(joined)).token_ids


def test_a_template_that_knows_only_strings_gets_strings(processor, byte_level_json):
    made = processor(byte_level_json, SPACED)
    as_list = made.chat(parse([user("a", "b")])).token_ids
    assert as_list == made.chat(parse([user("a\n\nb")])).token_ids


def test_a_template_that_knows_only_lists_gets_lists(processor, byte_level_json):
    inner = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
    made = processor(byte_level_json, "{% for m in messages %}" + inner + "{% endfor %}")
    assert b"".join(map(made.tokenizer.token_bytes, made.chat(parse([user("abc")])).token_ids)) == b"abc"


def test_an_older_template_finds_its_text_under_content(processor, byte_level_json):
    template = PIXTRAL.replace('chunk["text"]', 'chunk["content"]')
    new, old = (processor(byte_level_json, t).chat(parse([user("a", SMALL)])).token_ids for t in (PIXTRAL, template))
    assert new == old


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('No cats, please.') }}", "No cats, please"),
        ("{% for %}", "broken"),
        ("{{ messages.nothing.there }}", "refused"),
        ("{{ messages + 1 }}", "refused"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "refused"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "refused"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
        ("{{ 'a' * 10 ** 12 }}", "1,048,576 characters"),
        ("{{ [0] * 10 ** 12 }}", "1,048,576 characters"),
        ("{{ 9 ** (9 ** 9) }}", "1,048,576 characters"),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "characters"),
        ("{{ 'a'.encode('x') }}", "unknown encoding"),
        ("{{ '\\ud800'.encode() }}", "refused"),
        ("{% break %}", "broken"),
        ("(" * 3000 + "{{" + "(" * 3000, "broken"),
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_one_sentence(processor, byte_level_json, template, reason):
    with pytest.raises(TemplateFailed, match=re.escape(reason)) as caught:
        processor(byte_level_json, template).chat(parse([user("a")]))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_template_may_repeat_a_long_text(processor, byte_level_json):
    text = "ab " * 100_000
    made = processor(byte_level_json, "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")
    ids = made.chat(parse([user(text)])).token_ids
    assert b"".join(map(made.tokenizer.token_bytes, ids)).decode() == text * 2


def test_a_template_that_is_no_utf_8_is_one_sentence(checkpoint, byte_level_json, tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    files = checkpoint(tokenizer_json=byte_level_json, chat_template_jinja=tmp_path / "chat_template.jinja")
    with pytest.raises(TemplateFailed, match=r"chat_template\.jinja") as caught:
        Processor.from_checkpoint(files)
    assert caught.value.hint


SAID = ["It is", "It is  ", "  a\n", "[IMG", "a<", ""]


@pytest.mark.parametrize("template", [PIXTRAL, SPACED, NO_BOS, TRIMS])
@pytest.mark.parametrize("said", SAID)
def test_a_continued_answer_has_the_ids_of_transformers(processor, byte_level_json, template, said):
    messages = [SYSTEM, user("What?"), assistant(said)]
    if template == SPACED:
        messages = messages[1:]  # it writes system texts as answers
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(byte_level_json), bos_token="<s>", eos_token="</s>")
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, continue_final_message=True)
    ids = processor(byte_level_json, template).chat(parse(messages)).token_ids
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_continued_answer_in_parts_ends_with_its_last_text(processor, byte_level_json):
    inner = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}</s>"
    made = processor(byte_level_json, "{% for m in messages %}" + inner + "{% endfor %}")
    parts = {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]}
    ids = made.chat(parse([user("a"), parts])).token_ids
    assert b"".join(map(made.tokenizer.token_bytes, ids)) == b"abc" and ids.count(2) == 1


def test_a_system_text_alone_is_asked_with_an_empty_user_turn_where_the_template_would_lose_it(
    processor, byte_level_json
):
    made = processor(byte_level_json, PIXTRAL)
    assert made.chat(parse([SYSTEM])).token_ids == made.chat(parse([SYSTEM, user("")])).token_ids
    shows = processor(byte_level_json, NO_BOS)
    assert shows.chat(parse([SYSTEM])).token_ids == transformers_ids(byte_level_json, NO_BOS, [SYSTEM])


@pytest.mark.parametrize("template", ["{# a #}", "{{ bos_token }}", "{% for m in messages %}[INST][/INST]{% endfor %}"])
def test_a_template_that_passes_over_the_question_is_one_sentence(processor, byte_level_json, template):
    with pytest.raises(TemplateFailed, match="passes over what is asked") as caught:
        processor(byte_level_json, template).chat(parse([user("What colour is it?")]))
    assert "--raw" in caught.value.hint


@pytest.mark.parametrize("filter", ["upper", "tojson", "trim"])
@pytest.mark.parametrize("question", ['"x"', "C:\\x", "Straße?", "?!"])
def test_a_template_may_change_how_the_question_is_written(processor, byte_level_json, filter, question):
    template = "{% for m in messages %}[INST]{{ m.content | " + filter + " }}[/INST]{% endfor %}"
    assert processor(byte_level_json, template).chat(parse([user(question)])).token_ids


def test_a_template_without_room_for_an_image_is_one_sentence(processor, byte_level_json):
    with pytest.raises(TemplateFailed, match=r"0 \[IMG\] for 1 picture\."):
        processor(byte_level_json, SPACED).chat(parse([user("a", SMALL)]))


def test_the_usual_helpers_work(processor, byte_level_json):
    template = (
        "{{ {'a': 'é<'} | tojson }}{{ strftime_now('%Y') | length }}{% for i in [1, 2] %}{% if i == 2 %}{% break %}"
        "{% endif %}{{ i }}{% endfor %}{% generation %}g{% endgeneration %}{{ namespace(x=1).x }}"
    )
    made = processor(byte_level_json, template)
    said = b"".join(map(made.tokenizer.token_bytes, made.chat(parse([user("a")])).token_ids)).decode()
    assert said == '{"a": "é<"}41g1'


def test_templates_are_found_in_the_order_of_transformers(checkpoint):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    files = {
        "tokenizer_config_json": json.dumps({"chat_template": named}),
        "processor_config_json": '{"chat_template": "p"}',
        "chat_template_json": '{"chat_template": "j"}',
        "chat_template_jinja": "f",
    }
    given_files: dict[str, str] = {}
    found = []
    for name, text in files.items():
        given_files[name] = text
        found.append(find_template(checkpoint(**given_files).file))
    assert found == ["d", "p", "j", "f"]
    assert find_template(checkpoint().file) is None
