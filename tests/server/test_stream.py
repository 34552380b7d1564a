"""Chunks of a stream, read as an SSE client reads them, are the answer again."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixtral_cli.generation import Reply, TextEvent, Timings, TokenLogprob, Usage
from pixtral_cli.prompt.tool_calls import ToolCallDelta
from pixtral_cli.prompt.tools import ToolCall
from pixtral_cli.server import responses
from pixtral_cli.server.responses import DONE, Chunks, Envelope, takes_pieces
from pixtral_cli.server.wire import AnswerRequest

letters = st.characters(exclude_categories=["Cs"]) | st.sampled_from('\r\n\u2028\x85"\\\0')
texts = st.lists(st.text(letters, max_size=5))


def events(pieces, logprobs=False, calls=(), usage=(7, 3)):
    """One event for each piece and a last one without text, which ends the answer."""
    given = [TokenLogprob(token, piece, -0.5) if logprobs else None for token, piece in enumerate([*pieces, ""])]
    reply = Reply("m", "".join(pieces), [], [], "stop", Usage(*usage, 2, 1), Timings(0, 0, 0, 0, 0), None, calls)
    for token, piece in enumerate(pieces):
        yield TextEvent(piece, token, given[token])
    yield TextEvent("", len(pieces), given[-1], "tool_calls" if calls else "stop", reply, calls)


def with_usage(events):
    """The same, each with what was used up to its token."""
    return [replace(event, usage=Usage(7, count, 2, 1)) for count, event in enumerate(events, 1)]


def streamed(kind, answers, batch=1, in_pieces=True, **options):
    """The data of every event but the last, which is [DONE]; `answers` are lists of events."""
    request = AnswerRequest(kind, "m", {}, prompts=["a"] * len(answers), **options)
    chunks = Chunks(Envelope(request, "m", "f"), lambda token: b"x", in_pieces)
    together = [(place, event) for place, answer in enumerate(answers) for event in answer]
    body = chunks.opening(together)
    for start in range(0, len(together), batch):
        body += chunks.of(together[start : start + batch])
    body += chunks.closing()
    assert body.endswith(DONE)
    lines = body.decode("ascii").splitlines()  # at whatever Unicode calls the end of a line
    assert lines[1::2] == [""] * (len(lines) // 2)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2:2]]


@given(st.lists(texts, min_size=1, max_size=3), st.integers(1, 5), st.sampled_from(["chat", "text"]))
def test_what_is_streamed_adds_up_to_each_answer_however_it_is_cut(answers, batch, kind):
    said = [""] * len(answers)
    for chunk in streamed(kind, [list(events(pieces)) for pieces in answers], batch, include_usage=False):
        (choice,) = chunk["choices"]
        said[choice["index"]] += (choice["delta"].get("content") or "") if kind == "chat" else choice["text"]
    assert said == ["".join(pieces) for pieces in answers]


@given(texts)
def test_no_chunk_is_sent_for_a_token_without_text(pieces):
    chunks = streamed("chat", [list(events(pieces))], include_usage=False)
    assert len(chunks) == 1 + sum(map(bool, pieces)) + 1


@given(texts, st.sampled_from(["chat", "text"]))
def test_every_token_has_its_log_probability_once_also_when_its_text_was_held_back(pieces, kind):
    tokens = []
    for chunk in streamed(kind, [list(events(pieces, logprobs=True))], include_usage=False):
        told = chunk["choices"][0]["logprobs"]
        if told:
            tokens += [entry["token"] for entry in told["content"]] if kind == "chat" else told["tokens"]
    assert tokens == [*pieces, ""]


def test_the_usage_is_that_of_all_answers_and_comes_last_with_no_choice():
    chunks = streamed("chat", [list(events(["a"])), list(events(["b"]))], include_usage=True)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 14,
        "completion_tokens": 6,
        "total_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 2, "image_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_clients_of_mistrals_own_api_get_the_usage_with_the_last_choice_unasked():
    answers = [list(events(["a"])), list(events(["b"]))]
    *chunks, last = streamed("chat", answers, include_usage=False, in_pieces=False)
    assert all("usage" not in chunk for chunk in chunks)
    assert last["choices"][0]["finish_reason"] == "stop" and last["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_the_usage_in_each_chunk_is_that_of_its_answer_so_far(kind):
    answers = [with_usage(events(pieces)) for pieces in (["a", "", "b"], ["c"])]
    chunks = streamed(kind, answers, include_usage=True, usage_in_each=True)
    told = [[], []]
    for chunk in chunks[:-1]:
        used = chunk["usage"]
        assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
        told[chunk["choices"][0]["index"]].append((used["prompt_tokens"], used["completion_tokens"]))
    opening = [(7, 0)] if kind == "chat" else []
    assert told == [[*opening, (7, 1), (7, 3), (7, 4)], [*opening, (7, 1), (7, 2)]]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6


CALLS = ToolCall("abcdefghi", "add", '{"a": 1}'), ToolCall("jklmnopqr", "now", "{}")
DELTAS = [
    (ToolCallDelta(0, "abcdefghi", "add"), ToolCallDelta(0, arguments='{"a"')),
    (ToolCallDelta(0, arguments=": 1}"),),
    (),
    (ToolCallDelta(1, "jklmnopqr", "now"), ToolCallDelta(1, arguments="{}")),
]


def calling(logprobs=False):
    """The events of an answer of two calls."""
    *begun, last = events([""] * len(DELTAS), logprobs, CALLS)
    return [*(replace(event, tool_call_deltas=deltas) for event, deltas in zip(begun, DELTAS, strict=True)), last]


def told(chunks):
    return [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]


def test_calls_come_in_pieces_and_are_told_apart_by_their_index():
    chunks = streamed("chat", [calling()], include_usage=False)
    assert told(chunks) == [
        {"index": 0, "id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"a"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
        {"index": 1, "id": "jklmnopqr", "type": "function", "function": {"name": "now", "arguments": ""}},
        {"index": 1, "function": {"arguments": "{}"}},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_clients_that_take_no_pieces_get_each_call_whole():
    calls = told(streamed("chat", [calling()], include_usage=False, in_pieces=False))
    assert calls == [{"index": index, **responses.tool_call(call)} for index, call in enumerate(CALLS)]


@pytest.mark.parametrize("in_pieces", [True, False])
def test_the_log_probabilities_of_calls_come_once_each_and_with_the_pieces(in_pieces):
    chunks = streamed("chat", [calling(logprobs=True)], include_usage=False, in_pieces=in_pieces)
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert sum(len(each["content"]) for each in found if each) == len(DELTAS) + 1
    first_piece = next(chunk["choices"][0] for chunk in chunks if told([chunk]))
    assert len(first_piece["logprobs"]["content"]) == (1 if in_pieces else len(DELTAS) + 1)


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        ("OpenAI/Python 3.57.0", True),
        ("", True),
        ("mistral-client-python/3.7.0", False),
        ("mistral-client-typescript/1.9.0", False),
        ("python-httpx/0.28.1", False),
    ],
)
def test_clients_of_mistral_are_known_by_the_names_that_they_give(agent, expected):
    assert takes_pieces(agent) is expected
