"""What the engine and the service hold after requests have ended or were cut off: what they held before."""

import asyncio
import gc
import json
import socket
import time
from urllib.parse import urlsplit

import pytest
from support import traffic
from support.processes import PATIENCE

from pixtral_cli.engine.scheduler import CHUNK
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.server.service import Subscription


def test_nothing_of_requests_is_left_in_engine_or_service(server):
    before = of_requests()  # what failed elsewhere in this process lives on in tracebacks
    outcome = asyncio.run(traffic.many(urlsplit(server.url).port, range(5000, 5120), clients=32, cut_share=0.4))
    assert outcome.wrong == [] and outcome.cuts.total() > 30
    assert server.wait_until_idle()
    engine, service = server.engine, server.service
    assert (engine.running, engine.waiting, engine.table.in_use, service.accepted) == (0, 0, 0, 0)
    deadline = time.monotonic() + PATIENCE
    while kept := [each for each in of_requests() if not any(each is known for known in before)]:
        assert time.monotonic() < deadline, kept
        time.sleep(0.1)


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
    connection = sent(server, {"model": "tiny", "prompt": prompt, "max_tokens": 1, "stream": stream})
    while len(begun) < 2:
        time.sleep(0.01)
    connection.close()
    left = len(begun)
    assert server.wait_until_idle()
    assert len(begun) <= left + 1 < steps
    assert server.engine.table.in_use == 0


def sent(server, body):
    """A connection on which the request was sent."""
    port = urlsplit(server.url).port
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection
