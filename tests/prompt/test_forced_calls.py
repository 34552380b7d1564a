"""Calls forced on a model of random scores, with a real vocabulary, in each form in which models write them."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch
from support.engines import choose

from pixtral_cli import GenerationOptions, constraints
from pixtral_cli.engine.request import Sampling
from pixtral_cli.prompt.processor import Prompt
from pixtral_cli.prompt.tool_calls import ToolCallReader, joined
from pixtral_cli.prompt.tools import Tool

UNITS = {"type": "object", "properties": {"unit": {"$ref": "#/$defs/u"}}, "$defs": {"u": {"enum": ["é 何", "m"]}}}
TOOLS = (
    Tool("add", parameters={**UNITS, "required": ["unit"], "additionalProperties": False}),
    Tool("add-2", parameters={"properties": {"a": {"type": "boolean"}}, "additionalProperties": False}),
)
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
END = 2
FORMS = ("list", "named with id", "named", "text")


@pytest.fixture(scope="module")
def vocabulary(both):
    return constraints.vocabulary(both[0], {END})


def written(constraint, seed, begun=()):
    """The ids of an answer that begins with `begun`, until the model ends it, which it does as soon as it may."""
    random, sampling = torch.Generator().manual_seed(seed), Sampling(temperature=1.0, top_k=0)
    ids = []
    for place in range(2000):
        logits = torch.randn(131072 + 100, generator=random)
        logits[END] += 4  # rather than one call more
        free = place >= len(begun)
        ids.append(choose(logits, sampling, [], [], random, constraint) if free else begun[place])
        constraint.accept(ids[-1])
        if ids[-1] == END:
            return ids
    raise AssertionError("no end")


def read(tokenizer, ids, only_calls, cut=False):
    reader = ToolCallReader(tokenizer, reads_calls=True, only_calls=only_calls)
    read = [*map(reader.push, ids), reader.finish(cut)]
    return "".join(part.text for part in read), joined(delta for part in read for delta in part.calls)


def assert_kept(calls):
    assert 1 <= len(calls) <= constraints.MOST_CALLS
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert len({call.id for call in calls}) == len(calls)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_a_required_call_is_read_back_and_keeps_to_its_tool(both, vocabulary, form, seed):
    tokenizer = both[0]
    prompt = Prompt([1], [], tools=TOOLS, call_form=form)
    bound = constraints.constraint(prompt, GenerationOptions(tool_choice="required"), tokenizer, vocabulary)
    ids = written(bound, seed)
    assert (tokenizer.control("[TOOL_CALLS]") in ids) == (form != "text")
    text, calls = read(tokenizer, ids, form == "text")
    assert text == ""
    assert_kept(calls)


@pytest.mark.parametrize("form", FORMS)
def test_wherever_an_answer_is_cut_its_calls_are_the_beginning_of_the_whole_ones_and_no_text(both, vocabulary, form):
    prompt = Prompt([1], [], tools=TOOLS, call_form=form)
    ids = written(constraints.constraint(prompt, GenerationOptions(tool_choice="required"), both[0], vocabulary), 1)
    _, whole = read(both[0], ids, form == "text")
    for length in range(len(ids)):
        text, calls = read(both[0], ids[:length], form == "text", cut=True)
        assert text == "" and [call.name for call in calls] == [call.name for call in whole[: len(calls)]]
        beginning = "".join(call.arguments for call in calls)
        assert "".join(call.arguments for call in whole).startswith(beginning.removesuffix("\ufffd"))
        assert [call.arguments for call in calls[:-1]] == [call.arguments for call in whole[: len(calls)][:-1]]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "text"])
def test_a_call_that_the_model_begins_keeps_to_the_tools_and_what_stands_before_is_free(both, vocabulary, form):
    tokenizer = both[0]
    prompt = Prompt([1], [], tools=TOOLS, call_form=form)
    bound = constraints.constraint(prompt, GenerationOptions(parallel_tool_calls=False), tokenizer, vocabulary)
    begun = [*tokenizer.encode("I'll add [é]: "), tokenizer.control("[TOOL_CALLS]")]
    text, calls = read(tokenizer, written(bound, 1, begun), False)
    assert text == "I'll add [é]: " and len(calls) == 1
    assert_kept(calls)


@pytest.mark.parametrize("form", FORMS)
def test_a_named_function_is_called_once(both, vocabulary, form):
    prompt = Prompt([1], [], tools=TOOLS, call_form=form)
    choice = {"type": "function", "function": {"name": "add-2"}}
    bound = constraints.constraint(prompt, GenerationOptions(tool_choice=choice), both[0], vocabulary)
    _, (call,) = read(both[0], written(bound, 5), form == "text")
    assert call.name == "add-2"
