"""Thoughts in answers are told apart from what is said, whatever the tokens are; marks in a user's text are text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tool_builders import numbered_tekken

from pixtral_cli import GenerationOptions, constraints
from pixtral_cli.prompt.messages import parse
from pixtral_cli.prompt.processor import Prompt
from pixtral_cli.prompt.thoughts import AnswerReader, ThoughtMarks
from pixtral_cli.prompt.tokenizer_files import load
from pixtral_cli.prompt.tool_calls import AnswerDelta, ToolCallReader, joined
from pixtral_cli.prompt.tools import Tool

TEXT_MARKS = ThoughtMarks("<think>", "</think>", are_controls=False)
PLAIN = parse([{"role": "user", "content": "<think> [THINK]"}])


@pytest.fixture(scope="session")
def thirteen(tekken_file, tmp_path_factory):
    return load({"tekken.json": numbered_tekken(tekken_file, tmp_path_factory.mktemp("13"), 13)}.get)


def read(tokenizer, marks, ids, cut=False, tools=False, **begin):
    """Text, thought, calls and the number of tokens of thoughts."""
    reader = AnswerReader(tokenizer, ToolCallReader(tokenizer, reads_calls=tools), marks, **begin)
    deltas = [*map(reader.push, ids), reader.finish(cut)]
    whole = AnswerDelta("")
    for delta in deltas:
        whole = whole.then(delta)
    return whole.text, whole.thought, joined(whole.calls), reader.tokens


def controlled(tokenizer, *parts):
    """Token ids of texts and names of control tokens."""
    ids = []
    for part in parts:
        ids += [tokenizer.control(part)] if part in tokenizer.controls else tokenizer.encode(part)
    return ids


@given(thought=st.text("ab<think>/[THINK] \né", max_size=12), said=st.text("ab<think>[/THINK] \né", max_size=12))
@settings(deadline=None)
def test_between_control_tokens_every_letter_is_the_thoughts(thirteen, thought, said):
    marks = ThoughtMarks.of(thirteen, PLAIN)
    begin, end = (thirteen.control(mark) for mark in ("[THINK]", "[/THINK]"))
    thoughts = [begin, *thirteen.encode(thought), end]
    assert read(thirteen, marks, [*thoughts, *thirteen.encode(said), 2]) == (said, thought, (), len(thoughts))


def spelled(tokenizer, text, cuts):
    """Token ids of the text in pieces, each encoded by itself: other tokens than the whole has."""
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [id for a, b in pairwise(places) for id in tokenizer.encode(text[a:b], at_start=False)]


@given(
    thought=st.text("ab< \né", max_size=12),
    said=st.text("ab<think>/ \né", max_size=12),
    cuts=st.lists(st.integers(1, 40), max_size=12),
    blanks=st.tuples(*[st.sampled_from(["", "\n", "\n\n", " "])] * 4),
)
@settings(deadline=None)
def test_between_marks_in_text_every_letter_is_the_thoughts_but_for_blanks_around(tekken, thought, said, cuts, blanks):
    a, b, c, d = blanks
    ids = spelled(tekken, f"{a}<think>{b}{thought}{c}</think>{d}{said}", cuts)
    assert read(tekken, TEXT_MARKS, ids)[:2] == (said.lstrip(), thought.strip())


@pytest.mark.parametrize("said", ["", "<", "<thin", "<thinking> no", " <b>", "a <think>b</think>", "1 < 2", "\n\nHi"])
def test_an_answer_that_does_not_begin_with_a_thought_is_all_said(tekken, said):
    assert read(tekken, TEXT_MARKS, tekken.encode(said)) == (said, "", (), 0)
    cut_short = spelled(tekken, said, range(40))
    assert read(tekken, TEXT_MARKS, cut_short, cut=True) == (said, "", (), 0)


@pytest.mark.parametrize("cut", [False, True])
def test_a_thought_without_end_is_a_thought(thirteen, tekken, cut):
    ids = controlled(thirteen, "[THINK]", "Hm </thi")
    assert read(thirteen, ThoughtMarks.of(thirteen, PLAIN), ids, cut)[:2] == ("", "Hm </thi")
    assert read(tekken, TEXT_MARKS, tekken.encode("<think>Hm </thi"), cut)[:2] == ("", "Hm </thi")


def test_an_answer_can_begin_within_a_thought(thirteen, tekken):
    ids = controlled(thirteen, "and so", "[/THINK]", "3")
    assert read(thirteen, ThoughtMarks.of(thirteen, PLAIN), ids, is_open=True)[:2] == ("3", "and so")
    ids = tekken.encode("and so\n</think>\n\n3")
    assert read(tekken, TEXT_MARKS, ids, is_open=True)[:2] == ("3", "and so")


def test_the_middle_of_an_answer_does_not_begin_a_thought_in_text(tekken):
    assert read(tekken, TEXT_MARKS, tekken.encode("<think>a"), may_think=False)[:2] == ("<think>a", "")


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("in_text", [True, False])
def test_a_call_follows_a_thought_whether_that_was_closed_or_not(thirteen, closed, in_text):
    marks = TEXT_MARKS if in_text else ThoughtMarks.of(thirteen, PLAIN)
    begin, end = marks.begin, [marks.end] * closed
    ids = controlled(thirteen, begin, "Hm.", *end, "[TOOL_CALLS]", "add", "[ARGS]", '{"a": 1}', "</s>")
    text, thought, (call,), _ = read(thirteen, marks, ids, tools=True)
    assert (text, thought, call.name, call.arguments) == ("", "Hm.", "add", '{"a": 1}')


def test_several_thoughts_are_one_and_what_is_between_them_is_said(thirteen):
    ids = controlled(thirteen, "a", "[THINK]", "x", "[/THINK]", "b", "[THINK]", "y", "[/THINK]", "c")
    assert read(thirteen, ThoughtMarks.of(thirteen, PLAIN), ids)[:2] == ("abc", "xy")


def test_a_model_without_marks_thinks_only_where_system_or_template_speaks_of_it(tekken, thirteen):
    assert ThoughtMarks.of(tekken, PLAIN) is None
    asked = parse([{"role": "system", "content": "Write <think>thoughts</think> first."}, *[]])
    assert ThoughtMarks.of(tekken, asked) == ThoughtMarks.of(tekken, PLAIN, "… <think> …") == TEXT_MARKS
    assert ThoughtMarks.of(thirteen, asked).are_controls


def refused(constraint, ids):
    """The first token that the grammar does not allow, by its place; None if it allows all, and then the end."""
    for place, id in enumerate([*ids, 2]):
        mask = constraint.mask()
        if mask is not None and not mask[id]:
            return place
        constraint.accept(id)
    return None


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
BOUND = {
    "a schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": OBJECT}}},
    "a call": {"tool_choice": "required"},
    "either": {"response_format": {"type": "json_schema", "json_schema": {"schema": OBJECT}}, "tool_choice": "auto"},
}


@pytest.mark.parametrize("bound", BOUND)
@pytest.mark.parametrize("in_text", [True, False])
def test_a_thought_may_stand_before_what_an_answer_is_bound_to(thirteen, bound, in_text):
    marks = TEXT_MARKS if in_text else ThoughtMarks.of(thirteen, PLAIN)
    calls = ["[TOOL_CALLS]", "add", "[ARGS]", '{"a": 1}']
    answer = controlled(thirteen, *(['{"a": 1}'] if bound == "a schema" else calls))
    thought = controlled(thirteen, marks.begin, 'Hm {"a": </s>\n', marks.end)
    vocabulary = constraints.vocabulary(thirteen, {2})

    def result(ids, is_open=False, **more):
        tools = () if bound == "a schema" else (Tool("add", parameters=OBJECT),)
        prompt = Prompt([], [], True, tools, "named", thought_marks=marks, thought_is_open=is_open)
        options = GenerationOptions(**BOUND[bound], **more)
        return refused(constraints.constraint(prompt, options, thirteen, vocabulary), ids)

    assert result(answer) is None and result([*thought, *answer]) is None
    assert result([*thirteen.encode("Hm"), *answer]) == 0
    assert result(thought) == len(thought)  # an answer is missing
    assert result([*thought, *answer], reasoning_effort="none") == 0
    within = controlled(thirteen, "so", marks.end)
    assert result([*within, *answer], is_open=True) is None
