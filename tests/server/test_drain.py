"""How `pixtral serve` ends: what runs is finished or cut, what is new is refused, a second signal does not wait."""

import asyncio
import json
import signal
import threading

import httpx
import pytest
from support.processes import PATIENCE
from support.serving import hello, served, starting

from pixtral_cli.server.middleware import RequestTracker

DRAINING = "stopping"
LONG = {"max_tokens": 400, "ignore_eos": True}
ENDLESS = {"max_tokens": 12_000, "ignore_eos": True}


def test_what_runs_is_finished_and_what_waits_or_comes_is_refused():
    with served("--max-batch-size", "1") as server:
        running = server.events(**LONG)
        next(running)
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(server.open("/v1/chat/completions", hello())))
        waiting.start()
        while "pixtral_requests_queued 1.0" not in server.open("/metrics").read().decode():
            pass
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping")
        answers.append(server.open("/v1/chat/completions", hello()))
        waiting.join()
        assert [(answer.status, int(answer.headers["Retry-After"]) > 0) for answer in answers] == [(503, True)] * 2
        assert all(json.load(answer)["error"]["code"] == DRAINING for answer in answers)
        assert (server.open("/health").status, server.open("/ready").status) == (200, 503)
        *_, last, done = running
        assert json.loads(last)["choices"][0]["finish_reason"] == "length" and done == "[DONE]"
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.said() and "Cancel" not in server.said()


def test_after_the_drain_timeout_a_stream_ends_with_an_error_and_an_answer_is_503():
    with served("--drain-timeout", "0.3") as server:
        stream = server.events(**ENDLESS)
        next(stream)
        answers = []
        whole = threading.Thread(target=lambda: answers.append(server.open("/v1/chat/completions", hello(**ENDLESS))))
        whole.start()
        while "pixtral_requests_running 2.0" not in server.open("/metrics").read().decode():
            pass
        for _ in range(20):  # both have their first token by now
            next(stream)
        server.process.send_signal(signal.SIGINT)
        *_, last = stream
        assert json.loads(last)["error"]["code"] == DRAINING
        whole.join()
        assert answers[0].status == 503 and json.load(answers[0])["error"]["type"] == "server_error"
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.said() and "Cancel" not in server.said()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(number, code):
    with served() as server:
        stream = server.events(**ENDLESS)
        next(stream)
        server.process.send_signal(number)
        server.wait_for("stopping")
        assert server.end(number, seconds=5) == code
        assert "Traceback" not in server.said()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_while_the_model_loads_the_first_signal_ends_it_at_once(number, code):
    with starting() as server:
        server.wait_for("loading tiny")
        assert server.end(number, seconds=10) == code
        assert "address" not in server.said() and "Traceback" not in server.said()


def test_quiet_says_nothing_and_an_idle_server_ends_when_it_is_told_to():
    with starting("--port", str(free_port()), "--quiet") as server:
        server.url = f"http://127.0.0.1:{server.process.args[-2]}"
        wait_until_ready(server)
        assert server.open("/v1/chat/completions", hello(max_tokens=2)).status == 200
        assert server.open("/nowhere").status == 404
        assert server.end(seconds=5) == 0 and server.said() == ""


def test_before_the_model_is_there_it_lives_but_is_not_ready():
    async def ask():
        front = RequestTracker(lambda line: None)
        transport = httpx.ASGITransport(front)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.get("/health"), await client.get("/ready"), await client.post("/predict", json={})]

    health, *others = asyncio.run(ask())
    assert health.status_code == 200
    assert [(each.status_code, each.json()["error"]["code"]) for each in others] == [(503, "loading")] * 2
    assert all(int(each.headers["retry-after"]) > 0 for each in others)


def test_a_bug_behind_it_is_told_and_answered_with_500(caplog):
    async def broken(scope, receive, send):
        raise ZeroDivisionError("a bug")

    async def ask():
        front = RequestTracker(lambda line: None)
        front.begin(broken, lambda route, status: None)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://localhost") as client:
            return await client.get("/v1/models")

    answer = asyncio.run(ask())
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "a bug" not in answer.text and "A request failed" in caplog.text


def free_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_until_ready(server, seconds=PATIENCE):
    import time
    import urllib.error

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if server.open("/ready").status == 200:
                return
        except urllib.error.URLError:
            assert server.process.poll() is None
        time.sleep(0.02)
    raise AssertionError("it did not become ready")
