"""What real clients send by default is answered, by the server as a whole."""

import json

import pytest

HELLO = [{"role": "user", "content": "What can you do?"}]
ADD = {
    "name": "add",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]},
}


def ask(http, path="/v1/chat/completions", status=200, **fields):
    question = {"prompt": "Hello"} if path == "/v1/completions" else {"messages": HELLO}
    answer = http.post(path, json={"model": "tiny", **question, "max_tokens": 6, "temperature": 0, **fields})
    assert answer.status_code == status, answer.text
    return answer.json()


def stream(http, **fields):
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0, "stream": True, **fields}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]


def test_a_seed_below_0_is_a_fresh_one_also_where_the_server_has_its_own(http, server):
    asked = []
    submit = server.service.driver.submit
    server.service.driver.submit = lambda request, sink: asked.append(request.sampling.seed) or submit(request, sink)
    server.service.options["seed"] = 5
    try:
        for seed in (None, -1, 7):
            ask(http, seed=seed)
    finally:
        server.service.driver.submit = submit
        del server.service.options["seed"]
    assert asked == [5, None, 7]


def test_a_top_p_of_0_takes_the_likeliest_token(http):
    greedy = ask(http)["choices"]
    assert ask(http, temperature=2, top_p=0)["choices"] == greedy
    assert ask(http, temperature=0, top_k=-1)["choices"] == greedy


def test_usage_in_each_chunk_adds_up_to_the_last(http):
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    *chunks, last = stream(http, stream_options=options)
    told = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert told[0] == 0 and told == sorted(told) and told[-1] == last["usage"]["completion_tokens"] == 6
    assert {chunk["usage"]["prompt_tokens"] for chunk in [*chunks, last]} == {last["usage"]["prompt_tokens"]}


@pytest.mark.parametrize("call", [{"name": "add"}, "auto"])
def test_who_gives_functions_gets_a_function_call(http, call):
    choice = ask(http, functions=[ADD], function_call=call, max_tokens=100)["choices"][0]
    if call == "auto" and choice["finish_reason"] == "stop":  # the model is free not to
        assert "function_call" not in choice["message"] and choice["message"]["content"]
        return
    assert choice["finish_reason"] == "function_call" and "tool_calls" not in choice["message"]
    assert choice["message"]["function_call"]["name"] == "add" and choice["message"]["content"] is None
    assert set(json.loads(choice["message"]["function_call"]["arguments"])) == {"a"}


def test_a_function_call_without_functions_is_refused_by_its_own_name(http):
    assert ask(http, function_call={"name": "add"}, status=400)["error"]["param"] == "function_call"
    ask(http, function_call="auto")


def test_a_function_call_is_streamed_as_one(http):
    chunks = stream(http, functions=[ADD], function_call={"name": "add"}, max_tokens=100)
    parts = [chunk["choices"][0]["delta"].get("function_call") for chunk in chunks]
    parts = [part for part in parts if part]
    assert "".join(part.get("name", "") for part in parts) == "add"
    assert set(json.loads("".join(part["arguments"] for part in parts))) == {"a"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "One two three. " * 6000}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a b c " * 200_000}]}, "messages"),
        ("/v1/completions", {"prompt": "One two three. " * 6000}, "prompt"),
        ("/v1/completions", {"prompt": "a b c " * 200_000}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 20_000}, "prompt"),
    ],
)
def test_a_prompt_that_is_too_long_is_told_by_the_code_that_clients_shorten_it_by(http, tiny, path, fields, param):
    assert tiny.max_length < 20_000
    for stream in (False, True):
        error = ask(http, path, 400, stream=stream, **fields)["error"]
        assert (error["code"], error["param"], error["type"]) == (
            "context_length_exceeded",
            param,
            "invalid_request_error",
        )


def test_pictures_in_low_detail_cost_fewer_tokens(http):
    """256x96 pixels are 16x6 patches as they are; 1024x64 in low detail are 32x2."""
    import base64
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (1024, 64), "red").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    def seen(detail):
        part = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
        return http.post("/tokenize", json={"messages": messages}).json()["images"]

    assert seen("low") == [{"width": 512, "height": 32, "tokens": 2 * 33}]
    assert seen("auto") == seen("high") != seen("low")


def test_models_are_listed_as_mistrals_clients_read_them(http):
    (model,) = http.get("/v1/models").json()["data"]
    assert model["type"] == "base" and model["object"] == "model"
    assert model["capabilities"]["completion_chat"] is model["capabilities"]["vision"] is True


def test_a_format_that_grammars_do_not_know_is_an_annotation(http):
    schema = {"properties": {"p": {"type": "string", "format": "path", "maxLength": 3}}, "required": ["p"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", **schema}}}
    answer = ask(http, response_format=form, max_tokens=60)["choices"][0]["message"]["content"]
    assert set(json.loads(answer)) == {"p"}
