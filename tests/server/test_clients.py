"""Programs of others talk to the server as they talk to OpenAI: curl, simonw/llm, the openai package."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from typing import Annotated

import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from support.serving import hello, served
from support.traffic import ADD, CHAT, picture

JSON = ["-H", "Content-Type: application/json"]
with_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def curl(*arguments, input=None):
    done = subprocess.run(["curl", "-sS", *arguments], input=input, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def data_of(text):
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


@with_curl
def test_curl_shows_each_event_when_it_is_sent(server):
    body = json.dumps(hello(stream=True, max_tokens=300, ignore_eos=True))
    arguments = ["curl", "-sSN", *JSON, "-d", body, server.url + CHAT]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        first = process.stdout.readline()
        running = "pixtral_requests_running 1.0" in server.open("/metrics").read().decode()
        rest = process.stdout.read().decode()
    assert first.startswith(b"data: {") and running
    assert process.returncode == 0 and data_of(rest)[-1] == "[DONE]"


@with_curl
def test_curl_may_send_a_body_piece_by_piece(server):
    body = json.dumps(hello(max_tokens=4)).encode()
    chunked = [*JSON, "-H", "Transfer-Encoding: chunked", "--data-binary", "@-", server.url + CHAT]
    assert json.loads(curl(*chunked, input=body))["choices"] == server.json(CHAT, hello(max_tokens=4))["choices"]


@with_curl
def test_curl_may_send_a_large_body_from_a_file_after_asking_whether_it_may(server, tmp_path):
    parts = [{"type": "text", "text": "What is this?"}]
    parts += [{"type": "image_url", "image_url": {"url": picture(9, 256, 256)}}] * 20
    request = tmp_path / "request.json"
    request.write_text(json.dumps(hello(messages=[{"role": "user", "content": parts}], max_tokens=4), indent=8))
    answer = curl(*JSON, "-H", "Expect: 100-continue", "--data", f"@{request}", server.url + CHAT)
    assert json.loads(answer)["usage"]["prompt_tokens_details"]["image_tokens"] > 0


@with_curl
def test_curl_sees_errors_as_statuses(server):
    arguments = [*JSON, "-d", json.dumps(hello(model="gpt-4")), "-w", "%{http_code}", "-o", "/dev/null"]
    assert curl(*arguments, server.url + CHAT) == "404"
    assert curl("-w", "%{http_code}", "-o", "/dev/null", server.url + CHAT) == "405"


@pytest.fixture
def llm(server, tmp_path):
    """simonw/llm, whose only model is the server's."""
    entry = {"model_id": "px", "model_name": "tiny", "api_base": server.url + "/v1", "api_key_name": "px"}
    entry |= {"vision": True, "supports_schema": True, "supports_tools": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))  # JSON is YAML
    (tmp_path / "keys.json").write_text('{"px": "none"}')
    env = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    program = str(Path(sys.executable).parent / "llm")

    def run(*arguments):
        done = subprocess.run(
            [program, *arguments], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_llm_streams_an_answer_and_goes_on_with_the_conversation(server, llm):
    question = "Hello, who are you?"
    said = llm("-m", "px", question, "-o", "temperature", "0")
    asked = [{"role": "user", "content": question}]
    first = server.json(CHAT, hello(messages=asked))["choices"][0]["message"]["content"]
    assert said == first.strip()
    asked += [{"role": "assistant", "content": said}, {"role": "user", "content": "And now?"}]
    second = server.json(CHAT, hello(messages=asked))["choices"][0]["message"]["content"]
    assert llm("-c", "And now?", "-o", "temperature", "0") == second.strip()


def test_llm_asks_about_an_attached_picture(server, llm, tmp_path):
    uri = picture(4, 100, 80)
    file = tmp_path / "picture.png"
    file.write_bytes(b64decode(uri.partition(",")[2]))
    parts = [{"type": "text", "text": "Colours?"}, {"type": "image_url", "image_url": {"url": uri}}]
    answer = server.json(CHAT, hello(messages=[{"role": "user", "content": parts}]))
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    expected = answer["choices"][0]["message"]["content"].strip()
    for more in ([], ["--no-stream"]):
        assert llm("-m", "px", "Colours?", "-a", str(file), "-o", "temperature", "0", *more) == expected


def test_llm_gets_what_its_schema_asks_for(llm):
    said = llm("-m", "px", "--schema", json.dumps(SHORT), "A shape, please.", "-o", "max_tokens", "60")
    assert json.loads(said)["kind"] in ("circle", "star")


SHORT = {
    "type": "object",
    "properties": {"kind": {"type": "string", "enum": ["circle", "star"]}},
    "required": ["kind"],
    "additionalProperties": False,
}


def test_openai_answers_a_call_and_gets_an_answer_about_its_result(client):
    messages = [{"role": "user", "content": "Add one and two."}]
    asked = {"model": "tiny", "tools": [ADD], "parallel_tool_calls": False, "temperature": 0, "max_tokens": 60}
    called = client.chat.completions.create(messages=messages, tool_choice="required", **asked).choices[0]
    (call,) = called.message.tool_calls
    assert called.finish_reason == "tool_calls" and call.function.name == "add"
    assert isinstance(json.loads(call.function.arguments)["a"], int)
    messages += [called.message, {"role": "tool", "tool_call_id": call.id, "content": "3"}]
    answer = client.chat.completions.create(messages=messages, tool_choice="none", **asked)
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content


class Shape(BaseModel):
    is_round: bool
    corners: Annotated[int, Field(ge=0, le=12)]


def test_openai_parses_an_answer_into_a_pydantic_model(client):
    asked = [{"role": "user", "content": "A circle?"}]
    answer = client.chat.completions.parse(model="tiny", messages=asked, response_format=Shape, max_tokens=120)
    assert isinstance(answer.choices[0].message.parsed, Shape)


def test_openai_stream_helper_puts_together_what_the_whole_answer_is(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0}
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message.content
    assert streamed == client.chat.completions.create(**asked).choices[0].message.content


def test_openai_sees_the_bytes_of_a_stream_as_they_come(client):
    raw = client.chat.completions.with_streaming_response.create(
        model="tiny", messages=[{"role": "user", "content": "Hello!"}], stream=True, max_tokens=5
    )
    with raw as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"


def test_openai_asks_many_at_once(server):
    async def ask():
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            asked = {"model": "tiny", "max_tokens": 6, "temperature": 0}
            asks = [
                client.chat.completions.create(messages=[{"role": "user", "content": f"Count {n % 4}"}], **asked)
                for n in range(40)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asks)]

    answers = asyncio.run(ask())
    assert len(answers) == 40 and all(answers)


def test_openai_shows_two_pictures_whose_tokens_are_counted(server, client):
    def asked(*seeds):
        parts = [{"type": "image_url", "image_url": {"url": picture(seed, 64, 64)}} for seed in seeds]
        content = [*parts, {"type": "text", "text": "Which is larger?"}]
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=4, temperature=0
        )
        return answer.usage.prompt_tokens_details.image_tokens

    assert asked(1, 2) == 2 * asked(1) > 0
