"""`echo` on /v1/completions: the prompt before its answer, with log-probabilities its tokens before the answer's."""

import asyncio
import threading
from itertools import chain

import openai
import pytest
import torch
from transformers import AutoModelForImageTextToText

from pixtral_cli.errors import RequestError
from pixtral_cli.generation import Echo, TextEvent
from pixtral_cli.server import service
from pixtral_cli.server.responses import Chunks, Envelope, EventStream
from pixtral_cli.server.threads import Threads
from pixtral_cli.server.wire import AnswerRequest
from pixtral_cli.tiny import FOLDER

PROMPT = "Where is the star? 🧀 é"


@pytest.fixture(scope="module")
def oracle():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def complete(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    return lambda prompt=PROMPT, **options: client.completions.create(model="tiny", prompt=prompt, **options)


def columns(told):
    return told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset


def test_the_prompt_comes_before_the_answer_as_it_was_written(complete):
    plain = complete().choices[0]
    echoed = complete(echo=True).choices[0]
    assert echoed.text == PROMPT + plain.text
    assert (echoed.finish_reason, echoed.logprobs) == (plain.finish_reason, None)
    assert complete(echo=False).choices[0] == plain


def test_of_tokens_what_they_spell_is_told_without_control_tokens_and_each_is_listed(complete, tiny):
    ids = [1, 3, *tiny.source.complete("Hi you").token_ids[1:], 4]
    choice = complete(ids, echo=True, logprobs=1, max_tokens=4).choices[0]
    assert choice.text == "Hi you" + complete(ids, max_tokens=4).choices[0].text
    assert choice.logprobs.tokens[:2] == ["<s>", "[INST]"] and choice.logprobs.tokens[len(ids) - 1] == "[/INST]"
    assert choice.logprobs.text_offset[:3] == [0, 0, 0] and choice.logprobs.text_offset[len(ids) - 1] == 6
    assert choice.logprobs.text_offset[len(ids)] == 6


@pytest.mark.parametrize("bos", ["", "<s>"])
def test_control_words_of_a_text_are_told_as_they_were_written(complete, bos):
    choice = complete(bos + "[INST]Hi you[/INST]", echo=True, logprobs=1, max_tokens=4).choices[0]
    told = choice.logprobs
    assert choice.text.startswith(bos + "[INST]Hi you[/INST]")
    assert told.tokens[:2] == ["<s>", "[INST]"] and "[/INST]" in told.tokens
    starts = [*zip(told.tokens, told.text_offset, strict=True)]
    assert starts[:2] == [("<s>", 0), ("[INST]", len(bos))]
    assert all(choice.text.startswith(token, at) for token, at in starts[1:] if token != "</s>")


def test_log_probabilities_are_those_of_the_whole_text(complete, oracle, tiny):
    choice = complete(echo=True, logprobs=2, max_tokens=5).choices[0]
    told, ids = choice.logprobs, tiny.source.complete(PROMPT).token_ids
    answer = tiny.complete(PROMPT, max_new_tokens=5).token_ids
    with torch.no_grad():
        logprobs = oracle(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    wanted = [float(row[token]) for row, token in zip(logprobs, [*ids, *answer][1:], strict=False)]
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    assert [max(top.values()) for top in told.top_logprobs[1:]] == pytest.approx(
        [float(row.max()) for row in logprobs[:-1]], abs=1e-4
    )
    own = [*zip(told.top_logprobs, told.tokens, told.token_logprobs, strict=True)][1:]
    assert all(top[token] == logprob or "\ufffd" in token for top, token, logprob in own)
    starts = zip(told.tokens, told.text_offset, strict=True)
    assert all(choice.text.startswith(token, at) for token, at in starts if "\ufffd" not in token and token != "<s>")
    assert told.text_offset[len(ids)] == len(PROMPT)


def test_the_answers_part_is_that_without_echo(complete):
    plain, echoed = (complete(echo=echo, logprobs=2).choices[0].logprobs for echo in (False, True))
    length = len(plain.tokens)
    assert [column[-length:] for column in columns(echoed)][:3] == [*columns(plain)][:3]
    assert echoed.text_offset[-length:] == [offset + len(PROMPT) for offset in plain.text_offset]


def test_without_alternatives_only_the_tokens_own_is_told(complete):
    for echo in (False, True):
        told = complete(echo=echo, logprobs=0).choices[0].logprobs
        own = [None if logprob is None else [logprob] for logprob in told.token_logprobs]
        assert [top and list(top.values()) for top in told.top_logprobs] == own


@pytest.mark.parametrize("logprobs", [None, 1])
def test_with_no_new_tokens_only_the_prompt_is_told(complete, tiny, logprobs):
    completion = complete(echo=True, max_tokens=0, logprobs=logprobs)
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    length = len(tiny.source.complete(PROMPT).token_ids)
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (length, 0)
    assert choice.logprobs is None if logprobs is None else len(choice.logprobs.token_logprobs) == length
    with pytest.raises(openai.BadRequestError, match="0 with echo"):
        complete(max_tokens=0)


@pytest.mark.parametrize("max_tokens", [0, 1, 12])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_adds_up_to_the_whole_and_begins_with_the_prompt(complete, max_tokens, logprobs):
    options = {"echo": True, "max_tokens": max_tokens, "logprobs": logprobs, "n": 2}
    whole = complete(["One two", PROMPT], **options)
    chunks = list(complete(["One two", PROMPT], stream=True, stream_options={"include_usage": True}, **options))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert parts[0].text == ["One two", PROMPT][choice.index // 2]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason
        told = [columns(part.logprobs) for part in parts if part.logprobs]
        if logprobs is not None:
            joined = [list(chain.from_iterable(column)) for column in zip(*told, strict=True)]
            assert joined == [*columns(choice.logprobs)]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_one_token_has_a_log_probability_of_none(complete):
    told = complete([86], echo=True, logprobs=1, max_tokens=0).choices[0].logprobs
    assert columns(told) == (["W"], [None], [None], [0])


def test_prompts_of_many_lengths_together_are_each_as_alone(complete):
    prompts = [[1, *range(100, 100 + length)] for length in (1, 5, 300, 20, 600)]
    together = complete(prompts, echo=True, logprobs=1, max_tokens=1).choices
    assert together[2].logprobs == complete(prompts[2], echo=True, logprobs=1, max_tokens=1).choices[0].logprobs
    assert [len(choice.logprobs.tokens) for choice in together] == [len(prompt) + 1 for prompt in prompts]


def test_more_than_memory_should_hold_is_refused(complete, monkeypatch):
    monkeypatch.setattr(service, "MAX_LOGPROBS", 100)
    told = complete([[1] * 10, [1] * 15], echo=True, logprobs=3, max_tokens=0).choices
    assert [len(choice.logprobs.tokens) for choice in told] == [10, 15]
    assert complete([[1] * 26], echo=True, max_tokens=0).choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="Send fewer prompts"):
        complete([[1] * 10, [1] * 16], echo=True, logprobs=3, max_tokens=0)


def test_the_python_api_tells_the_prompt_of_a_chat_too(tiny):
    reply = tiny.chat([{"role": "user", "content": "Hello!"}], echo=True, logprobs=True, max_new_tokens=0)
    assert (reply.text, reply.token_ids, reply.finish_reason) == ("", [], "length")
    assert [entry.token_id for entry in reply.echo.logprobs] == reply.prompt_token_ids
    assert reply.echo.text.strip() == "Hello!"
    assert reply.timings.decode_tokens_per_s == 0
    with pytest.raises(RequestError, match="max_new_tokens should be"):
        tiny.complete("a", max_new_tokens=0)
    with pytest.raises(RequestError, match="echo should be"):
        tiny.complete("a", echo="yes")


async def test_a_prompt_is_written_into_a_stream_on_a_thread_and_not_in_the_event_loop(tiny):
    writers = []

    class Writer(Chunks):
        def of(self, events):
            writers.append(threading.current_thread().name)
            return super().of(events)

    async def no_more():
        return
        yield

    async def send(message): ...

    echo = Echo("Hi", [1], tiny.processor.tokenizer, ())
    first = [(0, TextEvent("", None, echo=echo))]
    chunks = Writer(Envelope(AnswerRequest("text", "m", {}), "m", "f"), lambda token: b"")
    stream = EventStream(first, no_more(), chunks, None, Threads(1, "writer").run)
    await stream({"type": "http", "state": {}}, asyncio.Future, send)
    assert writers == ["writer"]
