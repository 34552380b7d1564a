"""A repository's SYSTEM_PROMPT.txt, filled in as Mistral's model cards do it."""

from __future__ import annotations

import json
from datetime import date

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from support.processes import PROGRAM, run_process
from support.thinking import thinking_folder
from support.tool_builders import numbered_tekken

from pixtral_cli import Pixtral
from pixtral_cli.errors import ModelError
from pixtral_cli.prompt.image import ImageSpec
from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.mistral_format import MistralFormat
from pixtral_cli.prompt.processor import Processor
from pixtral_cli.prompt.system_prompt import message
from pixtral_cli.prompt.tokenizer_files import load
from pixtral_cli.source import Source

SMALL = "You are {name}, a {model} {{of}} Mistral. Today is {today}, yesterday was {yesterday}.\n"
MAGISTRAL = "First think as in:[THINK]Your {name}.\nAs long as you want.[/THINK]Here, answer."
DAY = date(2026, 3, 1)


def test_name_and_days_are_filled_in_and_other_braces_stay():
    told = message(SMALL, "Small {today}", DAY, shows_thoughts=True)
    said = "You are Small {today}, a {model} {{of}} Mistral. Today is 2026-03-01, yesterday was 2026-02-28.\n"
    assert told == {"role": "system", "content": said}


def by_the_model_card(text):
    """What the card of Magistral-Small-2509 makes of its file."""
    begin, end = text.find("[THINK]"), text.find("[/THINK]")
    thought = {"type": "thinking", "thinking": text[begin + len("[THINK]") : end], "closed": True}
    before, after = text[:begin], text[end + len("[/THINK]") :]
    parts = [{"type": "text", "text": before}, thought, {"type": "text", "text": after}]
    return {"role": "system", "content": parts}


def test_a_thought_that_the_text_shows_gets_the_ids_of_the_model_card(tekken_file, tmp_path):
    path = numbered_tekken(tekken_file, tmp_path, 13)
    tokenizer = load({"tekken.json": path}.get)
    user = {"role": "user", "content": "a"}
    ours = parse([message(MAGISTRAL, "M", DAY, shows_thoughts=True), user])
    theirs = ChatCompletionRequest.from_openai([by_the_model_card(MAGISTRAL.replace("{name}", "M")), user])
    processor = Processor(tokenizer, MistralFormat(tokenizer), None, "native", ImageSpec())
    expected = MistralTokenizer.from_file(str(path)).encode_chat_completion(theirs).tokens
    assert processor.chat(ours).token_ids == expected
    assert message(MAGISTRAL, "{name}", DAY, shows_thoughts=False)["content"] == MAGISTRAL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = thinking_folder(tmp_path_factory.mktemp("thinking"))
    (found / "SYSTEM_PROMPT.txt").write_text(MAGISTRAL, encoding="utf-8-sig")
    return found


def test_the_flag_takes_the_text_of_the_repository(folder):
    def ids(*flags):
        done = run_process(PROGRAM, ["tokenize", "--model-path", str(folder), "-p", "a", "--json", *flags])
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["token_ids"]

    tokenizer = Source.open(str(folder), weights=False).processor.tokenizer
    told, bare = ids("--system", "default"), ids()
    assert told.count(tokenizer.control("[THINK]")) == told.count(tokenizer.control("[/THINK]")) == 1
    shown = "".join(map(tokenizer.label, told))
    assert f"Your {folder.name}.\nAs long as you want.[/THINK]Here, answer.\n\na" in shown and len(told) > len(bare)


def test_a_saved_model_keeps_the_text(folder, tmp_path):
    model = Pixtral.load(folder, devices="cpu")
    model.save(tmp_path / "saved.pixtral")
    saved = Source.open_serialized(tmp_path / "saved.pixtral")
    assert saved.system_message() == model.system_message() != {}


def test_a_model_without_the_text_says_so():
    with pytest.raises(ModelError, match=r"tiny brings no SYSTEM_PROMPT\.txt"):
        Source.open("tiny").system_message()
