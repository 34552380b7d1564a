"""The routes over a real socket: shapes, statuses, and streams byte by byte."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from support.processes import PATIENCE, wait_until
from support.serving import error_of, serving

from pixtral_cli.server.service import Limits, Service, checkpoint_defaults

HELLO = [{"role": "user", "content": "What can you do?"}]
POSTS = ["/v1/chat/completions", "/v1/completions", "/predict", "/tokenize", "/detokenize"]
SQUARE = (
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAQCAIAAAD4YuoOAAAAHklEQVR4nGP8"
    "z0BbwERj80ctGLVg1IJRC0YtoAoAAHBbAR/iw2C0AAAAAElFTkSuQmCC"
)
"""A PNG of 32x16 pixels."""
GETS = ["/v1/models", "/v1/models/tiny", "/health", "/ready", "/metrics", "/version", "/openapi.json", "/docs", "/"]


def picture(url):
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize("path", GETS)
def test_what_can_be_read_is_there(http, path):
    assert http.get(path).status_code == 200
    assert http.head(path).status_code == 200


@pytest.mark.parametrize("path", POSTS)
def test_a_wrong_method_is_405_in_openais_shape(http, path):
    assert error_of(http.get(path), 405)["code"] == "wrong_method"
    assert http.get(path).headers["allow"] == "POST"


@pytest.mark.parametrize("path", GETS)
def test_what_can_be_read_says_so_to_a_wrong_method(http, path):
    assert set(http.delete(path, headers={"Content-Type": "application/json"}).headers["allow"].split(", ")) == {
        "GET",
        "HEAD",
    }


def test_an_unknown_path_is_404_in_openais_shape(http):
    assert error_of(http.get("/v1/engines"), 404)["code"] == "unknown_path"
    assert error_of(http.get("/page/../../secret"), 404)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"model": NaN}', b"\xff", b"[" * 1000, b'{"a": 1, "a": 1}'])
def test_a_body_that_is_no_json_object_is_400(http, path, body):
    answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert error_of(answer, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", POSTS)
def test_an_unknown_field_is_400_with_its_name(http, path):
    error = error_of(http.post(path, json={"colour": "red"}), 400)
    assert error["param"] == "colour" and "colour" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/completions", {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
        ("/predict", {"messages": HELLO}),
    ],
)
def test_another_models_name_is_404(http, path, body):
    error = error_of(http.post(path, json={**body, "model": "other"}), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model"


def test_every_served_name_is_answered_to_and_given_back(own):
    running = own()
    running.service.names = ("small", "org/small")
    with httpx.Client(base_url=running.url, timeout=60) as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["small", "org/small"]
        assert http.get("/v1/models/org/small").json()["id"] == "org/small"
        body = {"messages": HELLO, "max_tokens": 1}
        assert http.post("/v1/chat/completions", json={**body, "model": "org/small"}).json()["model"] == "org/small"
        error_of(http.post("/v1/chat/completions", json={**body, "model": "tiny"}), 404)
        assert http.post("/predict", json=body).json()["model"] == "small"


def test_tokens_of_a_prompt_come_back_as_that_prompt(http, tiny):
    text = "How many tokens, käse 🧀?"
    answer = http.post("/tokenize", json={"prompt": text}).json()
    assert answer == {
        "tokens": tiny.source.complete(text).token_ids,
        "count": len(tiny.source.complete(text).token_ids),
        "max_model_len": tiny.max_length,
    }
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_control_words_are_control_tokens_in_a_raw_prompt_and_text_in_a_chat(http, tiny):
    inst, end = (tiny.processor.tokenizer.control(name) for name in ("[INST]", "[/INST]"))
    raw = http.post("/tokenize", json={"prompt": "<s>[INST]hi[/INST]"}).json()["tokens"]
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"]
    assert raw == chat and raw[0] == 1 and (raw[1], raw[-1]) == (inst, end)
    said = {"role": "user", "content": "<s>[INST]hi[/INST]"}
    assert http.post("/tokenize", json={"messages": [said]}).json()["tokens"].count(inst) == 1
    answers = [
        http.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "temperature": 0}).json()["choices"][0]
        for prompt in ("[INST]hi[/INST]", raw)
    ]
    assert answers[0]["text"] == answers[1]["text"]


def test_tokens_of_messages_are_those_that_an_answer_is_charged_for(http):
    square = "data:image/png;base64," + SQUARE
    messages = [{"role": "user", "content": [picture(square), {"type": "text", "text": "What is this?"}]}]
    tokenized = http.post("/tokenize", json={"messages": messages}).json()
    assert tokenized["images"] == [{"width": 32, "height": 16, "tokens": 3}]
    usage = http.post("/predict", json={"messages": messages, "max_tokens": 1}).json()["usage"]
    assert tokenized["count"] == len(tokenized["tokens"]) == usage["prompt_tokens"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 3


def test_a_token_that_the_model_does_not_know_is_400(http):
    assert "no token" in error_of(http.post("/detokenize", json={"tokens": [10**6]}), 400)["message"]
    prompt = http.post("/v1/completions", json={"model": "tiny", "prompt": [10**6]})
    assert "no token" in error_of(prompt, 400)["message"]
    picture_mark = http.post("/v1/completions", json={"model": "tiny", "prompt": [1, 10]})
    assert "picture" in error_of(picture_mark, 400)["message"]


def test_a_prompt_longer_than_the_context_is_400(http, tiny):
    ids = [5] * tiny.max_length
    message = error_of(http.post("/v1/completions", json={"model": "tiny", "prompt": ids}), 400)["message"]
    assert str(tiny.max_length) in message


def test_more_pictures_than_allowed_are_refused_before_one_is_fetched(http):
    messages = [{"role": "user", "content": [picture("http://127.0.0.1:9/never.png")] * 33}]
    assert "--max-images" in error_of(http.post("/predict", json={"messages": messages}), 400)["message"]


def test_a_stream_is_events_that_nothing_may_hold_back(http):
    body = {"messages": HELLO, "max_tokens": 3, "stream": True, "temperature": 0}
    with http.stream("POST", "/predict", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        events = answer.read().decode().split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_half_a_character_is_never_sent(http, tiny):
    assert len(tiny.processor.tokenizer.encode("🧀")) > 1
    schema = {"type": "json_schema", "json_schema": {"name": "cheese", "schema": {"const": "🧀 é🧀"}}}
    body = {"model": "tiny", "prompt": "a", "max_tokens": 50, "response_format": schema, "stream": True}
    events = http.post("/v1/completions", json=body).text.split("\n\n")
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in events if event.startswith("data: {")]
    assert "\ufffd" not in "".join(texts) and json.loads("".join(texts)) == "🧀 é🧀"


def test_the_description_names_every_route_and_field(http):
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) == {path for path in GETS + POSTS if path not in ("/openapi.json", "/docs", "/")} - {
        "/v1/models/tiny"
    } | {"/v1/models/{name}"}
    fields = document["components"]["schemas"]["ChatRequest"]
    assert {"messages", "model", "min_p", "logit_bias", "ignore_eos"} <= set(fields["properties"])
    assert fields["required"] == ["model", "messages"] and fields["additionalProperties"] is False


def test_the_page_of_the_description_names_nothing_but_files_of_the_server(http):
    page = http.get("/docs").text
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(addresses) == 5 and "//" not in page and "<style" not in page
    assert [http.get(f"/{address}").status_code for address in addresses] == [200] * 5


def test_a_full_queue_is_429_and_names_the_flag(own):
    running = own(limits=Limits(max_queue=1))
    room = running.engine.scheduler.max_batch_size + 1
    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=running.url, timeout=60) as http:
        first = pool.submit(http.post, "/predict", json={"messages": HELLO, "n": 16, "max_tokens": 100})
        wait_until(lambda: running.service.accepted == 16)
        second = pool.submit(http.post, "/predict", json={"messages": HELLO, "max_tokens": 3})
        wait_until(lambda: running.service.accepted == room)
        refused = http.post("/predict", json={"messages": HELLO, "max_tokens": 3})
        assert "--max-queue" in error_of(refused, 429)["message"]
        assert int(refused.headers["retry-after"]) > 0
        assert first.result().status_code == second.result().status_code == 200
        assert http.post("/predict", json={"messages": HELLO, "max_tokens": 3}).status_code == 200


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (lambda: RuntimeError("CUDA out of memory. Tried to allocate 2 GiB at secret.py"), "out_of_memory"),
        (MemoryError, "out_of_memory"),
        (lambda: ValueError("secret"), "internal_error"),
    ],
)
def test_a_failure_in_one_request_is_500_without_its_inside_and_the_next_one_works(
    http, server, monkeypatch, error, code
):
    def fail(*_):
        raise error()  # one that lived on would keep the requests alive that its traceback has seen

    with monkeypatch.context() as patched:
        patched.setattr(server.engine.runner, "run", fail)
        for stream in (False, True):
            told = error_of(http.post("/predict", json={"messages": HELLO, "stream": stream}), 500)
            assert told["type"] == "server_error" and told["code"] == code
            assert "secret" not in told["message"]
    assert http.post("/predict", json={"messages": HELLO, "max_tokens": 2}).status_code == 200
    assert server.wait_until_idle()


def test_a_failure_in_a_stream_is_its_last_event_and_is_counted(http, server, monkeypatch):
    def failed():
        counted = re.search(r'pixtral_errors_total\{kind="server_error"\} (\S+)', http.get("/metrics").text)
        return float(counted[1]) if counted else 0

    run = server.engine.runner.run
    steps = iter(range(100))
    before = failed()

    def fail_later(pieces):
        if next(steps) > 3:
            raise ValueError("secret")
        return run(pieces)

    with monkeypatch.context() as patched:
        patched.setattr(server.engine.runner, "run", fail_later)
        with http.stream("POST", "/predict", json={"messages": HELLO, "stream": True}) as answer:
            *chunks, last, rest = answer.read().decode().split("\n\n")
    assert rest == "" and len(chunks) > 1
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and "secret" not in error["message"]
    assert failed() == before + 1
    assert server.wait_until_idle()


def test_what_a_request_does_not_say_comes_from_the_flags_and_then_from_the_checkpoint(own, tiny, monkeypatch):
    monkeypatch.setitem(tiny.source.checkpoint.generation_config, "do_sample", True)
    monkeypatch.setitem(tiny.source.checkpoint.generation_config, "temperature", 1.9)
    monkeypatch.setitem(tiny.source.checkpoint.generation_config, "min_p", 0.3)
    running = own(defaults={"temperature": 0.4})
    asked = []
    submit = tiny.driver.submit
    monkeypatch.setattr(tiny.driver, "submit", lambda request, sink: asked.append(request) or submit(request, sink))
    for given in ({}, {"temperature": 0.1}):
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 1, **given}
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=PATIENCE).status_code == 200
    assert [(request.sampling.temperature, request.sampling.min_p) for request in asked] == [(0.4, 0.3), (0.1, 0.3)]


def test_a_checkpoint_samples_only_where_it_says_so():
    assert checkpoint_defaults({"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}) == {
        "repetition_penalty": 1.1
    }
    assert checkpoint_defaults({"do_sample": True, "temperature": 0.7, "eos_token_id": 2}) == {"temperature": 0.7}


def test_the_caches_of_different_keys_are_apart(tiny):
    with serving(Service(tiny, ("tiny",)), keys=("one", "two")) as running:
        body = {"messages": [{"role": "user", "content": "A secret. " * 400}], "max_tokens": 1}

        def cached(key):
            headers = {"Authorization": f"Bearer {key}"}
            answer = httpx.post(f"{running.url}/predict", json=body, headers=headers, timeout=PATIENCE)
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("one") == 0
        assert cached("two") == 0
        assert cached("one") > 0
