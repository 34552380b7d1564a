"""How `pixtral serve` ends: what runs is finished or cut, what is new is refused, a second signal does not wait."""

import json
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.error import URLError

import httpx
import pytest
from support.processes import PATIENCE, wait_until
from support.serving import error_of, hello, served, starting
from support.traffic import SLOW_PICTURE

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
        wait_until(lambda: is_ready(server))
        assert server.open("/v1/chat/completions", hello(max_tokens=2)).status == 200
        assert server.open("/nowhere").status == 404
        assert server.end(seconds=5) == 0 and server.said() == ""


def test_who_waits_when_the_server_drains_is_503_and_who_runs_is_finished(own):
    running = own()
    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=running.url, timeout=60) as http:
        first = pool.submit(http.post, "/predict", json=hello(n=16, max_tokens=60))
        wait_until(lambda: running.engine.running == 16)
        second = pool.submit(http.post, "/predict", json=hello())
        wait_until(lambda: running.engine.waiting == 1)
        running.call(running.service.drain)
        assert error_of(second.result(), 503)["code"] == "stopping"
        assert int(second.result().headers["retry-after"]) > 0
        error_of(http.post("/predict", json=hello()), 503)
        error_of(http.get("/ready"), 503)
        assert http.get("/health").status_code == 200
        assert all(choice["finish_reason"] for choice in first.result().json()["choices"])


def test_who_waits_for_a_picture_when_the_server_drains_is_503_at_once(own, tiny, monkeypatch):
    running = own()
    fetching, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(tiny.processor, "open_image", lambda source: fetching.set() or go_on.wait(2 * PATIENCE))
    body = hello(messages=[{"role": "user", "content": [SLOW_PICTURE]}])
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(httpx.post, f"{running.url}/predict", json=body, timeout=60)
        assert fetching.wait(PATIENCE)
        running.call(running.service.drain)
        assert error_of(asking.result(PATIENCE), 503)["code"] == "stopping"
        assert not running.service.idle
        go_on.set()
    assert running.wait_until_idle()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def is_ready(server):
    assert server.process.poll() is None
    with suppress(URLError):
        return server.open("/ready").status == 200
