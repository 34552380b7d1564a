"""What requests do to each other over HTTP: nothing to the answers, and only what is meant to the time."""

import asyncio
import json
import socket
import threading
import time
from http.client import HTTPConnection
from itertools import pairwise
from urllib.parse import urlsplit

import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families
from support.processes import wait_until
from support.serving import hello, served
from support.traffic import CHAT, picture

KEYS = {"PIXTRAL_API_KEY": "first-key second-key"}
LONG = "Is the circle left of the star, or is the star above the square? "


@pytest.fixture(scope="module")
def server():
    with served("--quantization-encoding", "float32", "--max-queue", "3", "--max-batch-size", "16", env=KEYS) as server:
        yield server


def key(name="first-key"):
    return {"Authorization": f"Bearer {name}"}


def sample(server, name):
    text = server.open("/metrics", headers=key()).read().decode()
    found = [s.value for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    assert len(found) == 1
    return found[0]


def prompts():
    """Thirty of very different lengths, some with pictures."""
    for number in range(30):
        text = LONG * (number % 5 * 7) + f"Question {number}?"
        picked = [picture(seed, 100, 40 + 20 * seed) for seed in range(number % 3)]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in picked]
        yield [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_16_at_once_get_the_very_answers_and_probabilities_that_each_gets_alone(server):
    async def ask(at_once):
        turn = asyncio.Semaphore(at_once)
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="first-key", max_retries=0) as client:

            async def one(messages):
                async with turn:
                    answer = await client.chat.completions.create(
                        model="tiny", messages=messages, temperature=0, max_tokens=24, logprobs=True, top_logprobs=3
                    )
                return answer.choices[0].model_dump()

            return await asyncio.gather(*[one(messages) for messages in prompts()])

    together = asyncio.run(ask(16))
    assert together == asyncio.run(ask(1))
    assert len({choice["message"]["content"] for choice in together}) > 3


def test_the_second_question_about_a_picture_is_cached_for_the_key_that_asked_the_first(server):
    def cached(question, name):
        url = picture(77, 256, 256)
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        asked = hello(messages=[{"role": "user", "content": parts}], max_tokens=2)
        details = server.json(CHAT, asked, key(name))["usage"]["prompt_tokens_details"]
        assert details["image_tokens"] > 200
        return details["cached_tokens"]

    assert cached("What is it?", "first-key") == 0
    assert cached("Which colour has it?", "first-key") >= 200
    assert cached("Which colour has it?", "second-key") == 0


def open_stream(server, body):
    """A raw connection on which the request has been sent."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", urlsplit(server.url).port), 30)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer first-key\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def wait_for(server, name, wanted):
    wait_until(lambda: sample(server, name) == wanted)


def test_a_client_that_leaves_during_its_prefill_leaves_the_rest_of_it_uncomputed(server):
    prompt = LONG * 350  # many steps, of which each is short
    counted = server.json("/tokenize", {"prompt": prompt}, key())["count"]
    assert counted > 5_000
    asked = hello(messages=[{"role": "user", "content": prompt}], max_tokens=1)
    begun = time.monotonic()
    server.json(CHAT, asked, key())
    whole = time.monotonic() - begun
    before = sample(server, "pixtral_prompt_tokens_total")
    connection = open_stream(server, asked | {"messages": [{"role": "user", "content": "Now " + prompt}]})
    wait_for(server, "pixtral_requests_running", 1)
    assert sample(server, "pixtral_kv_cache_used_ratio") > 0 and whole > 0.5
    connection.close()
    left = time.monotonic()
    wait_for(server, "pixtral_requests_running", 0)
    assert time.monotonic() - left < whole / 3
    assert sample(server, "pixtral_kv_cache_used_ratio") == 0
    assert sample(server, "pixtral_prompt_tokens_total") == before  # it never came to its first token


def test_a_queue_that_is_full_says_when_to_come_back_and_which_flag_it_is(server):
    streams = [open_stream(server, hello(stream=True, max_tokens=12_000, ignore_eos=True)) for _ in range(19)]
    try:
        wait_for(server, "pixtral_requests_running", 16)
        wait_for(server, "pixtral_requests_queued", 3)
        refused = server.open(CHAT, hello(), key())
        assert refused.status == 429 and int(refused.headers["Retry-After"]) > 0
        assert "--max-queue" in json.load(refused)["error"]["message"]
    finally:
        for stream in streams:
            stream.close()
    wait_for(server, "pixtral_requests_running", 0)
    assert server.open(CHAT, hello(max_tokens=2), key()).status == 200


def listen(server, times, stop):
    """Note when each line of a stream comes, until one has come after `stop` was set."""
    with server.open(CHAT, hello(stream=True, max_tokens=12_000, ignore_eos=True), key()) as response:
        for _ in response:
            last = stop.is_set()
            times.append(time.monotonic())
            if last:
                return


@pytest.fixture
def streaming(server):
    """A stream that others must not hold up: the longest it has waited for a line, in seconds, and so for the next."""
    stop, times = threading.Event(), []
    thread = threading.Thread(target=listen, args=(server, times, stop))
    thread.start()
    while not times:
        assert thread.is_alive()
        time.sleep(0.01)

    def longest():
        asked = time.monotonic()
        stop.set()
        thread.join(30)
        assert not thread.is_alive() and times[-1] >= asked, "the stream has ended, or stands still"
        return max(later - before for before, later in pairwise(times))

    yield longest
    stop.set()
    thread.join(30)
    wait_for(server, "pixtral_requests_running", 0)


BOMBS = {
    "wide": {"enum": [f"value {n}" for n in range(400_000)]},
    "many": {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(20_000)}},
    "multiple": {"type": "integer", "multipleOf": 10**15 + 37},
    "circular": {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}},
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_of_a_schema_is_refused_while_others_stream_on(server, streaming, bomb):
    begun = time.monotonic()
    schema = {"type": "json_schema", "json_schema": {"name": "bomb", "schema": BOMBS[bomb]}}
    answer = server.open(CHAT, hello(response_format=schema, max_tokens=4), key())
    assert answer.status == 400 and json.load(answer)["error"]["message"]
    assert time.monotonic() - begun < 20
    assert streaming() < 3


def test_100_000_messages_are_refused_while_others_stream_on(server, streaming):
    messages = [{"role": ("user", "assistant")[n % 2], "content": "Hi"} for n in range(99_999)]
    answer = server.open(CHAT, hello(messages=messages), key(), timeout=100)
    assert answer.status == 400 and json.load(answer)["error"]["param"] == "messages"
    assert streaming() < 3


def raw(server, body):
    client = HTTPConnection("127.0.0.1", urlsplit(server.url).port, timeout=30)
    client.request("POST", CHAT, body, {"Content-Type": "application/json", **key()})
    response = client.getresponse()
    return response.status, json.loads(response.read())["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "code"),
    [(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Drip: ", "head_timeout"), (None, "body_timeout")],
)
def test_who_drips_is_sent_away_in_time_while_others_stream_on(server, streaming, start, code):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer first-key\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), 0.2) as connection:
        connection.sendall(start or head.encode())
        while not (answer := drip(connection)):
            assert time.monotonic() - begun < 45
    assert b" 408 " in answer and code.encode() in answer
    assert streaming() < 3


def drip(connection):
    """Send one more byte; what has been answered."""
    connection.sendall(b" ")
    try:
        return connection.recv(65536)
    except TimeoutError:
        return b""


MESSAGES = b'"messages": [{"role": "user", "content": "Hi"}]'


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"model": "tiny", "temperature": NaN, %b}' % MESSAGES, "not finite"),
        (b'{"model": "tiny", "top_p": 1e999, %b}' % MESSAGES, "not finite"),
        (b'{"model": "tiny\xff", %b}' % MESSAGES, "not UTF-8"),
        (b'{"model": "tiny", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b", %b}" % MESSAGES, "64 levels"),
    ],
)
def test_json_that_could_hurt_is_400(server, body, said):
    status, error = raw(server, body)
    assert status == 400 and said in error["message"]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file:etc/passwd",
        "../../etc/passwd",
        "/etc/passwd",
        "~/.bashrc",
        "picture.png",
        "http://127.0.0.1:{port}/page/icon.svg",
        "http://localhost:{port}/",
        "http://2130706433:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://169.254.169.254/latest/meta-data/",
        "-",
    ],
)
def test_a_picture_from_where_none_may_come_is_refused_and_nothing_of_it_is_told(server, url):
    parts = [{"type": "image_url", "image_url": {"url": url.format(port=urlsplit(server.url).port)}}]
    answer = server.open(CHAT, hello(messages=[{"role": "user", "content": parts}]), key())
    said = json.load(answer)["error"]["message"]
    assert answer.status == 400 and "root:" not in said and "401" not in said and "refused" not in said.lower().split()


def test_one_picture_too_many_is_refused_by_the_name_of_the_flag(server):
    parts = [{"type": "image_url", "image_url": {"url": picture(1, 32, 32)}}] * 33
    answer = server.open(CHAT, hello(messages=[{"role": "user", "content": parts}]), key())
    assert answer.status == 400 and "--max-images" in json.load(answer)["error"]["message"]
