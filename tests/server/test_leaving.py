"""When requests have ended, or their clients have left at any moment, engine and service hold what they held before."""

import asyncio
import gc
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from support import traffic
from support.processes import PATIENCE, wait_until
from support.serving import hello
from support.traffic import CHAT, SLOW_PICTURE

from pixtral_cli.engine.scheduler import CHUNK
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.server.service import Subscription

COMPLETIONS = "/v1/completions"
LONG = hello(max_tokens=4000, ignore_eos=True)


def test_nothing_of_requests_is_left_in_engine_or_service(server):
    before = of_requests()  # what failed elsewhere in this process lives on in tracebacks
    outcome = asyncio.run(traffic.many(urlsplit(server.url).port, range(5000, 5120), clients=32, cut_share=0.4))
    assert outcome.wrong == [] and outcome.cuts.total() > 30
    assert server.wait_until_idle()
    engine, service = server.engine, server.service
    assert (engine.running, engine.waiting, engine.table.in_use, service.accepted) == (0, 0, 0, 0)
    wait_until(lambda: not [each for each in of_requests() if not any(each is known for known in before)])


def sent(server, body, path=CHAT):
    """A connection on which the request was sent."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", urlsplit(server.url).port))
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def leave_after(server, body, condition, path=CHAT):
    """Ask, wait until `condition`, then cut the connection."""
    with sent(server, body, path):
        wait_until(condition)


def of_requests():
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (Sequence, Subscription)]


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_during_the_prefill_is_computed_no_further_than_the_step_under_way(server, monkeypatch, stream):
    begun, run = [], server.engine.runner.run

    def slowly(pieces):
        begun.append(time.monotonic())
        time.sleep(0.2)
        return run(pieces)

    monkeypatch.setattr(server.engine.runner, "run", slowly)
    prompt = f"{stream} and so on. " * 1500
    steps = len(server.service.model.source.complete(prompt).token_ids) // CHUNK
    connection = sent(server, {"model": "tiny", "prompt": prompt, "max_tokens": 1, "stream": stream}, COMPLETIONS)
    wait_until(lambda: len(begun) > 1)
    connection.close()
    left = len(begun)
    assert server.wait_until_idle()
    assert len(begun) <= left + 1 < steps
    assert server.engine.table.in_use == 0


def test_a_stream_that_its_reader_leaves_frees_all_it_held(http, server):
    before, generated = server.engine.table.in_use, server.engine.counters.generated_tokens
    with http.stream("POST", CHAT, json={**LONG, "stream": True, "n": 4}) as answer:
        next(answer.iter_raw())
        assert server.engine.running == 4
    assert server.wait_until_idle()
    assert server.engine.running == 0 and server.engine.table.in_use == before
    assert server.engine.counters.generated_tokens - generated < 4 * LONG["max_tokens"]


def test_a_client_that_leaves_without_a_stream_frees_all_it_held(server):
    before, generated = server.engine.table.in_use, server.engine.counters.generated_tokens
    leave_after(server, LONG, lambda: server.engine.running == 1)
    assert server.wait_until_idle()
    assert server.engine.table.in_use == before
    assert server.engine.counters.generated_tokens - generated < LONG["max_tokens"]


def test_a_client_that_leaves_while_its_prompt_is_computed_frees_all_it_held(server):
    before = server.engine.table.in_use
    words = " ".join(str(number) for number in range(2500))
    body = {"model": "tiny", "prompt": words, "max_tokens": 4000}
    generated = server.engine.counters.generated_tokens
    leave_after(server, body, lambda: server.engine.running == 1, COMPLETIONS)
    assert server.wait_until_idle()
    assert server.engine.table.in_use == before
    assert server.engine.counters.generated_tokens == generated


def test_a_client_that_leaves_the_queue_is_never_computed(server):
    with ThreadPoolExecutor(1) as pool:
        blocking = pool.submit(
            httpx.post, f"{server.url}/predict", json={**LONG, "n": 16, "max_tokens": 120}, timeout=60
        )
        wait_until(lambda: server.engine.running == 16)
        leave_after(server, LONG, lambda: server.engine.waiting == 1)
        wait_until(lambda: server.engine.waiting == 0)
        assert server.engine.running == 16
        assert blocking.result().status_code == 200
    assert server.wait_until_idle()


def test_a_client_that_leaves_while_its_picture_is_fetched_is_forgotten_at_once(own, tiny, monkeypatch):
    running = own()
    fetching, go_on = threading.Event(), threading.Event()

    def load(source):
        fetching.set()
        go_on.wait(2 * PATIENCE)
        raise AssertionError("nobody waits for it")

    monkeypatch.setattr(tiny.processor, "open_image", load)
    body = {**LONG, "messages": [{"role": "user", "content": [SLOW_PICTURE]}]}
    leave_after(running, body, fetching.is_set)
    wait_until(lambda: running.service.accepted == 0)
    assert not running.service.idle
    go_on.set()
    assert running.wait_until_idle()
