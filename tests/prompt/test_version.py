"""The version of Mistral's rules is never guessed from the vocabulary: ids equal mistral-common's, tools included."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from support.tool_builders import DATA, call, mistral_ids, mistral_request, sentencepiece_metadata

from pixtral_cli.prompt import tokenizer_files
from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.mistral_format import MistralFormat
from pixtral_cli.prompt.processor import Processor
from pixtral_cli.prompt.tools import parse_tools

TOOLS = [{"type": "function", "function": {"name": "now", "description": "é", "parameters": {"type": "object"}}}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "w"},
    {"role": "assistant", "content": "", "tool_calls": [call("abcdefghi", "now", "{}")]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "Sunny"},
]
PIXTRALS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'user' %}[INST]{{ m.content }}"
    "[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SMALLS = PIXTRALS.replace("{% elif", "[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% elif", 1)


def theirs(tokenizer, messages, tools=TOOLS):
    return tokenizer.encode_chat_completion(mistral_request(messages, tools)).tokens


def ours(files, messages, tools=TOOLS):
    return Processor.from_checkpoint(files).chat(parse(messages), parse_tools(tools)).token_ids


@pytest.fixture(scope="session")
def named_json(tekken_file, tmp_path_factory) -> Path:
    """Pixtral's vocabulary as a tokenizer.json with the names of all control tokens, those of V7 included."""
    whole = tokenizer_files.load({"tekken.json": tekken_file}.get).text_model
    names = [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    assert "[SYSTEM_PROMPT]" in names and "[TOOL_CONTENT]" in names
    data = json.loads(whole.to_str())
    data["added_tokens"] = [
        {"id": id, "content": name, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
         "single_word": False} for id, name in enumerate(names)
    ]  # fmt: skip
    data["model"]["vocab"] |= {name: id for id, name in enumerate(names)}
    path = tmp_path_factory.mktemp("named") / "tokenizer.json"
    path.write_text(json.dumps(data))
    return path


def gguf(metadata: dict, template: str | None = None) -> SimpleNamespace:
    written = metadata | ({"chat_template": template} if template else {})
    return SimpleNamespace(form="gguf", written_tokenizer=written, file=lambda name: None)


@pytest.mark.parametrize("tools", [TOOLS, []])
@pytest.mark.parametrize("template", [None, "", PIXTRALS])
def test_a_v3_vocabulary_with_the_names_of_v7_gets_the_rules_of_v3(checkpoint, named_json, mistral, template, tools):
    """As in mistral-community/pixtral-12b, whose template passes over tools."""
    given = {} if template is None else {"chat_template_jinja": template}
    files = checkpoint("hf", tokenizer_json=named_json, **given)
    assert ours(files, TURNS, tools) == theirs(mistral, TURNS, tools)
    assert Processor.from_checkpoint(files).chat(parse(TURNS)).call_form == "list"


def test_a_template_with_a_system_turn_shows_v7(checkpoint, named_json, mistral):
    files = checkpoint("hf", tokenizer_json=named_json, chat_template_jinja=SMALLS)
    assert ours(files, TURNS) == mistral_ids(mistral.instruct_tokenizer.tokenizer, 7, TURNS, TOOLS)


@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_a_tekken_file_says_its_version(checkpoint, name):
    files = checkpoint("native", tekken_json=DATA / name)
    assert ours(files, TURNS) == theirs(MistralTokenizer.from_file(str(DATA / name)), TURNS)


@pytest.mark.parametrize("template", [None, PIXTRALS])
def test_a_gguf_of_v3_gets_the_rules_of_v3(template):
    name = "mistral_instruct_tokenizer_240323.model.v3"
    expected = theirs(MistralTokenizer.from_file(str(DATA / name)), TURNS)
    assert ours(gguf(sentencepiece_metadata(name), template), TURNS) == expected


def test_a_gguf_whose_template_shows_v7_gets_the_rules_of_v7():
    name = "mistral_instruct_tokenizer_241114.model.v7"
    expected = theirs(MistralTokenizer.from_file(str(DATA / name)), TURNS)
    assert ours(gguf(sentencepiece_metadata(name), SMALLS), TURNS) == expected


@pytest.mark.parametrize(
    ("template", "written", "version"),
    [
        (None, None, 3),
        (None, 11, 11),
        ("{{ messages[0].content }}", 11, 11),
        (PIXTRALS, None, 3),
        (PIXTRALS, 7, 3),
        (SMALLS, None, 7),
        (SMALLS, 13, 13),
        (SMALLS, 3, 7),
    ],
)
def test_the_template_is_asked_first_then_tekken_json_then_it_is_pixtrals(template, written, version):
    assert MistralFormat(SimpleNamespace(version=written), template).version == version
