"""Thoughts on the server, as the real `openai` client sees them."""

from __future__ import annotations

import openai
import pytest
from support.serving import serving
from support.thinking import ASKED, saying, thinking_model

from pixtral_cli.server.service import Service

HELLO = [{"role": "user", "content": "Hello!"}]
THINK, END, CALLS = 20, 21, 9
SCRIPT = f'<[{THINK}]> "STOP, think. " <[{END}]> "It is 3. STOP, really."'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return thinking_model(tmp_path_factory.mktemp("thinking"))


@pytest.fixture(scope="module")
def client(model):
    with (
        serving(Service(model, ("thinker",))) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def chat(client):
    def ask(messages=HELLO, **options):
        return client.chat.completions.create(model="thinker", messages=messages, **ASKED, **options)

    return ask


@pytest.fixture(autouse=True)
def script():
    with saying(SCRIPT):
        yield


def test_a_thought_stands_beside_the_content_and_its_tokens_are_counted(chat, model):
    answer = chat(stop=["STOP"])
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("STOP, think. ", "It is 3. ")
    assert answer.choices[0].finish_reason == "stop"
    told = len(model.processor.tokenizer.encode("STOP, think. ", at_start=False)) + 2
    assert 2 < answer.usage.completion_tokens_details.reasoning_tokens <= told < answer.usage.completion_tokens


@pytest.mark.parametrize("logprobs", [None, True])
def test_a_stream_has_the_thought_in_deltas_of_its_own_before_the_content(chat, logprobs):
    chunks = list(chat(stream=True, stream_options={"include_usage": True}, logprobs=logprobs))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    contents = [delta.content or "" for delta in deltas]
    assert "".join(thoughts) == "STOP, think. " and "".join(contents) == "It is 3. STOP, really."
    assert not any(thought and content for thought, content in zip(thoughts, contents, strict=True))
    assert max(n for n, text in enumerate(thoughts) if text) < min(n for n, text in enumerate(contents) if text)
    assert sum(map(bool, thoughts)) > 1  # as it is thought
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens > 2
    if logprobs:
        told = [chunk.choices[0].logprobs.content for chunk in chunks[:-1] if chunk.choices[0].logprobs]
        assert sum(map(len, told)) == chunks[-1].usage.completion_tokens


def test_an_answer_that_is_cut_in_a_thought_has_no_content(chat):
    answer = chat(max_tokens=3)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "length")
    assert "STOP, think. ".startswith(answer.choices[0].message.reasoning_content)


def test_without_a_thought_nothing_is_told_of_one(chat):
    with saying('"It is 3."'):
        answer = chat()
    assert answer.choices[0].message.content == "It is 3."
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("form", ["field", "other field", "parts", "parts of parts"])
def test_an_earlier_thought_can_be_sent_back_in_each_form(chat, model, form):
    said = {"type": "text", "text": "3"}
    entry = {
        "field": {"content": "3", "reasoning_content": "Hm."},
        "other field": {"content": "3", "reasoning": "Hm."},
        "parts": {"content": [{"type": "thinking", "thinking": "Hm."}, said]},
        "parts of parts": {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, said]},
    }[form]
    messages = [*HELLO, {"role": "assistant", **entry}, *HELLO]
    tokens = chat(messages).usage.prompt_tokens
    bare = chat([*HELLO, {"role": "assistant", "content": "3"}, *HELLO]).usage.prompt_tokens
    assert tokens == bare + 2 + len(model.processor.tokenizer.encode("Hm.", at_start=False))


@pytest.mark.parametrize(
    "entry",
    [
        {"role": "user", "content": [{"type": "thinking", "thinking": "Hm."}]},
        {"role": "assistant", "content": "3", "reasoning_content": "a", "reasoning": "b"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}], "reasoning_content": "a"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": 3}]},
        {"role": "assistant", "content": "3", "reasoning_content": 3},
    ],
)
def test_a_thought_that_cannot_be_meant_is_refused(chat, entry):
    with pytest.raises(openai.BadRequestError):
        chat([*HELLO, entry, *HELLO])


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh"])
def test_efforts_of_openai_are_taken_by_a_model_that_cannot_be_told(chat, effort):
    assert chat(reasoning_effort=effort).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        chat(reasoning_effort="a lot")
