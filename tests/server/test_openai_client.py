"""The real `openai` package talks to the real server: what its users rely on."""

import asyncio
import base64
import json
from io import BytesIO

import openai
import pytest
from PIL import Image

HELLO = [{"role": "user", "content": "What can you do?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "colour",
        "description": "Paint it.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"enum": ["red", "blue"]}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}
YES_OR_NO = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"yes": {"type": "boolean"}},
            "required": ["yes"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def chat(client):
    def ask(messages=HELLO, **options):
        return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 30, **options})

    return ask


@pytest.fixture(scope="module")
def whole(tiny):
    """What the Python API says to `HELLO`."""
    return tiny.chat(HELLO, max_new_tokens=30)


def picture(colour):
    file = BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def test_an_answer_is_that_of_the_python_api(chat, whole):
    answer = chat()
    assert answer.choices[0].message.content == whole.text
    assert answer.choices[0].finish_reason == whole.finish_reason
    assert answer.id.startswith("chatcmpl-") and answer.model == "tiny" and answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == whole.usage.prompt_tokens
    assert answer.usage.completion_tokens == whole.usage.completion_tokens
    assert answer.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_a_stream_adds_up_to_the_whole_answer(chat, whole):
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(chunks) - 2) + [whole.finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []  # the usage alone
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_without_being_asked_a_stream_tells_no_usage(chat):
    assert all(chunk.choices and chunk.usage is None for chunk in chat(stream=True))


def test_many_asynchronous_streams_at_once_get_what_each_would_get_alone(server, tiny):
    questions = [f"What can you do? {number}" for number in range(8)]

    async def one(client, question):
        messages = [{"role": "user", "content": question}]
        stream = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, question) for question in questions))

    together = asyncio.run(all_of_them())
    assert together == [tiny.chat([{"role": "user", "content": q}], max_new_tokens=20).text for q in questions]
    assert server.wait_until_idle()


def test_pictures_are_seen_and_counted(chat):
    question = {"type": "text", "text": "What is the background?"}
    answer = chat([{"role": "user", "content": [picture("red"), picture("blue"), question]}])
    assert answer.usage.prompt_tokens_details.image_tokens == 2 * (4 * 4 + 4)
    assert answer.choices[0].message.content


def test_what_was_computed_before_is_told(chat):
    messages = [{"role": "system", "content": "Be kind. " * 300}, *HELLO]
    assert chat(messages, max_tokens=2).usage.prompt_tokens_details.cached_tokens == 0
    again = chat(messages, max_tokens=2).usage
    assert 0 < again.prompt_tokens_details.cached_tokens < again.prompt_tokens


def test_several_answers_have_seeds_of_their_own_that_can_be_repeated(client):
    def texts(**options):
        options = {"max_tokens": 12, "temperature": 2.0, **options}
        choices = client.completions.create(model="tiny", prompt="One two", **options).choices
        assert [choice.index for choice in choices] == list(range(len(choices)))
        return [choice.text for choice in choices]

    first = texts(n=3, seed=7)
    assert len(set(first)) == 3
    assert texts(n=3, seed=7) == first
    assert texts(seed=8) == first[1:2]


def test_several_answers_stream_side_by_side(chat, whole):
    texts = {0: "", 1: ""}
    for chunk in chat(n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: whole.text, 1: whole.text}


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(chat, whole):
    middle = whole.text[20:25]
    expected = whole.text[: whole.text.index(middle)]
    answer = chat(stop=middle).choices[0]
    assert (answer.message.content, answer.finish_reason) == (expected, "stop")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chat(stop=[middle], stream=True)) == expected


def test_log_probabilities_are_told_for_each_token_in_streams_as_in_whole_answers(chat):
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 6}
    entries = chat(**options).choices[0].logprobs.content
    assert len(entries) == 6
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in entries)
    assert all(bytes(entry.bytes).decode() == entry.token for entry in entries)
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries)
    streamed = [chunk.choices[0].logprobs for chunk in chat(stream=True, **options)]
    tokens = [entry.token for part in streamed if part for entry in part.content]
    assert tokens == [entry.token for entry in entries]


def test_a_biased_token_does_not_come(chat, tiny):
    first = tiny.chat(HELLO, max_new_tokens=1).token_ids[0]
    assert chat(logit_bias={str(first): -100}, max_tokens=1, logprobs=True).choices[0].logprobs.content[0].token != (
        tiny.processor.tokenizer.token_bytes(first).decode()
    )


def test_a_schema_is_kept_to(chat):
    for stream in (False, True):
        answer = chat(response_format=YES_OR_NO, stream=stream)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
        assert list(json.loads(text)) == ["yes"] and isinstance(json.loads(text)["yes"], bool)


def test_a_forced_call_is_told_as_a_call(chat):
    options = {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "colour"}}, "max_tokens": 100}
    options["parallel_tool_calls"] = False
    answer = chat(**options).choices[0]
    assert answer.finish_reason == "tool_calls"
    call = answer.message.tool_calls[0]
    assert call.function.name == "colour" and json.loads(call.function.arguments)["name"] in ("red", "blue")


ENDS_LIST = {"92": 12}  # a token of the built-in model: "]", rather than one call more
CALLED = {"tools": [ADD], "tool_choice": "required", "max_tokens": 1000, "temperature": 2.0, "seed": 3}
CALLED["logit_bias"] = ENDS_LIST


def spoken(calls):
    return [(call.function.name, call.function.arguments) for call in calls]


def test_calls_are_streamed_in_pieces_that_the_package_puts_together_to_those_of_the_whole_answer(client, chat):
    whole = [choice.message for choice in chat(n=2, **CALLED).choices]
    assert all(message.content is None for message in whole)
    with client.chat.completions.stream(model="tiny", messages=HELLO, n=2, **CALLED) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices
    assert [spoken(choice.message.tool_calls) for choice in final] == [spoken(each.tool_calls) for each in whole]
    assert [choice.finish_reason for choice in final] == ["tool_calls"] * 2
    assert len(pieces) > 2 * sum(len(each.tool_calls) for each in whole)


def test_the_first_piece_of_each_call_has_its_name_and_the_others_arguments_alone(chat):
    chunks = list(chat(stream=True, **CALLED))
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
    heads = [part for part in parts if part.id]
    assert [head.index for head in heads] == list(range(len(heads)))
    assert all((head.type, head.function.name, head.function.arguments) == ("function", "colour", "") for head in heads)
    assert all(part.type is None and part.function.name is None for part in parts if not part.id)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("most", [3, 14, 40])
def test_a_call_that_is_cut_off_is_no_content_in_streams_as_in_whole_answers(chat, most):
    options = {**CALLED, "max_tokens": most, "parallel_tool_calls": False}
    whole = chat(**options).choices[0]
    chunks = [chunk.choices[0] for chunk in chat(stream=True, **options)]
    assert whole.finish_reason == chunks[-1].finish_reason == "length"
    assert not whole.message.content and not any(chunk.delta.content for chunk in chunks)
    parts = [part.function for chunk in chunks for part in chunk.delta.tool_calls or ()]
    written = "".join(part.arguments for part in parts)
    assert [(part.name, written) for part in parts if part.name] == spoken(whole.message.tool_calls or ())
    assert bool(parts) == (most > 3)


def test_log_probabilities_of_calls_are_told_once_in_streams_as_in_whole_answers(chat):
    options = {**CALLED, "logprobs": True}
    entries = [entry.token for entry in chat(**options).choices[0].logprobs.content]
    streamed = [chunk.choices[0].logprobs for chunk in chat(stream=True, **options)]
    assert [entry.token for part in streamed if part for entry in part.content] == entries


@pytest.mark.parametrize("agent", ["mistral-client-python/3.7.0", "python-httpx/0.28.1"])
def test_mistrals_own_clients_get_each_call_in_one_piece(chat, agent):
    chunks = chat(stream=True, extra_headers={"User-Agent": agent}, **CALLED)
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()]
    assert spoken(parts) == spoken(chat(**CALLED).choices[0].message.tool_calls)
    assert [part.index for part in parts] == list(range(len(parts))) and all(part.id for part in parts)


def test_the_result_of_a_call_can_be_sent_back(chat):
    answer = chat(tools=[ADD], tool_choice="required", parallel_tool_calls=False, max_tokens=100).choices[0].message
    result = {"role": "tool", "tool_call_id": answer.tool_calls[0].id, "content": "done"}
    after = chat([*HELLO, answer, result], tools=[ADD], tool_choice="none").choices[0]
    assert after.finish_reason in ("stop", "length") and not after.message.tool_calls


def test_completions_continue_texts_and_tokens(client, tiny):
    prompt = "What can you do?"
    expected = tiny.complete(prompt, max_new_tokens=16).text
    ids = tiny.source.complete(prompt).token_ids
    answer = client.completions.create(model="tiny", prompt=[prompt, prompt], logprobs=1)
    assert [choice.text for choice in answer.choices] == [expected, expected]
    assert answer.usage.prompt_tokens == 2 * len(ids) and answer.object == "text_completion"
    assert len(answer.choices[0].logprobs.tokens) == 16
    assert client.completions.create(model="tiny", prompt=ids).choices[0].text == expected
    stream = client.completions.create(model="tiny", prompt=prompt, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_log_probabilities_of_completions_say_where_each_token_stands_in_streams_as_in_whole_answers(client):
    cheese = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "é 🧀🧀 brie é"}}}
    options = {"model": "tiny", "prompt": "a", "logprobs": 2, "max_tokens": 60}
    options["extra_body"] = {"response_format": cheese}
    choice = client.completions.create(**options).choices[0]
    told = choice.logprobs
    starts = list(zip(told.tokens, told.text_offset, strict=True))
    assert any("\ufffd" in token for token in told.tokens) and "brie" in choice.text
    assert all(choice.text.startswith(token, start) for token, start in starts if "\ufffd" not in token)
    parts = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **options)]
    assert [offset for part in parts if part for offset in part.text_offset] == told.text_offset


def test_the_chosen_token_is_among_the_alternatives_of_completions(client):
    options = {"temperature": 2, "seed": 1, "logprobs": 1, "max_tokens": 12}
    told = client.completions.create(model="tiny", prompt="One two", **options).choices[0].logprobs
    chosen = zip(told.top_logprobs, told.tokens, told.token_logprobs, strict=True)
    assert all(top[token] == logprob for top, token, logprob in chosen)
    assert {len(top) for top in told.top_logprobs} == {1, 2}


def test_the_model_is_listed(client, tiny):
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert models[0].max_model_len == tiny.max_length
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_are_the_packages_own(chat, client):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(extra_body={"functions": []})
    assert caught.value.param == "functions" and "functions" in caught.value.message
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="no message before it makes a call of that id"):
        chat([*HELLO, {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"}])
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError, match="not a picture of a known format"):
        chat([{"role": "user", "content": [broken]}])
