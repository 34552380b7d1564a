"""Attacks on the HTTP side, on a real uvicorn: each ends in an error, and the next client is served."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support.guarded_server import Client, ask, guarded_port
from support.processes import PATIENCE, wait_until

from pixtral_cli.server import errors

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
MIB = 2**20


@pytest.fixture(scope="module")
def port():
    with (
        pytest.MonkeyPatch.context() as patch,
        guarded_port(max_body_bytes=MIB, body_seconds=0.5, head_seconds=0.5) as port,
    ):
        patch.setattr(errors, "LINGER_SECONDS", 0.5)
        yield port


@pytest.fixture(autouse=True)
def healthy_afterwards(port):
    yield
    assert ask(port)[0] == 200


def refused(client, status, code):
    answered, headers, body = client.answer()
    error = json.loads(body)["error"]
    assert (answered, error["code"]) == (status, code), error
    assert headers["connection"] == "close" and client.socket.recv(1) == b""
    return error["message"]


@pytest.mark.parametrize("start", [b"", b"P", b"POST / HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_a_head_that_never_ends_is_408(port, start):
    client = Client(port)
    client.send(start)
    assert "0.5 seconds" in refused(client, 408, "head_timeout")


def test_a_head_that_drips_is_408_in_the_same_time(port):
    client, start = Client(port), time.monotonic()
    client.drip(HEAD + b"X: y\r\n" * 99, 0.05)
    refused(client, 408, "head_timeout")
    assert 0.4 < time.monotonic() - start < 5


def test_a_second_head_on_a_connection_that_was_kept_has_no_more_time(port):
    client = Client(port)
    client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    file = client.socket.makefile("rb")
    while file.readline() != b"0\r\n":
        pass
    file.readline()
    client.drip(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 99, 0.05)
    refused(client, 408, "head_timeout")


def test_a_head_without_an_end_is_refused_long_before_it_fills_the_memory(port):
    client = Client(port)
    client.send(b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000)
    assert client.answer()[0] == 400


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\0\x01\0\x01", b"GET\r\n\r\n", b"\r\n", b"\0" * 99 + b"\r\n\r\n"])
def test_what_is_no_http_is_400(port, junk):
    client = Client(port)
    client.send(junk)
    status, _, body = client.answer()
    assert status in (400, 408) and json.loads(body)["error"]["message"]


@pytest.mark.parametrize("more", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_a_body_that_does_not_arrive_is_408(port, more):
    client = Client(port)
    client.send(HEAD + more)
    refused(client, 408, "body_timeout")


def test_a_body_that_drips_is_408(port):
    client = Client(port)
    client.send(HEAD + b"Content-Length: 100000\r\n\r\n")
    client.drip(b"x" * 100_000, 0.05)
    refused(client, 408, "body_timeout")


def test_a_stated_length_above_the_limit_is_413_although_nothing_was_sent(port):
    client = Client(port)
    client.send(HEAD + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % (MIB + 1))
    assert "--max-body-mib 1" in refused(client, 413, "body_too_large")


def test_a_client_that_sends_all_of_a_large_body_still_sees_the_413(port):
    status, _, answer = ask(port, "POST", body=bytes(30 * MIB))
    assert status == 413 and answer["error"]["code"] == "body_too_large"


def test_chunks_are_413_as_soon_as_they_are_too_many(port):
    client, sent = Client(port), 0
    client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while sent <= MIB:
        client.send(b"10000\r\n" + bytes(2**16) + b"\r\n")
        sent += 2**16
    refused(client, 413, "body_too_large")


def test_a_body_of_exactly_the_limit_is_read(port):
    status, _, answer = ask(port, "POST", body=bytes(MIB))
    assert (status, answer["length"]) == (200, MIB)


def test_curl_with_a_body_in_chunks_is_served_and_refused_alike(port, tmp_path):
    for size, status in ((1000, "200"), (3 * MIB, "413")):
        (tmp_path / "body").write_bytes(bytes(size))
        command = ["curl", "-sS", "-o", tmp_path / "answer", "-w", "%{http_code}", "--data-binary", f"@{tmp_path}/body"]
        headers = ["-H", "Content-Type: application/json", "-H", "Transfer-Encoding: chunked"]
        url = f"http://127.0.0.1:{port}/v1/completions"
        done = subprocess.run([*command, *headers, url], capture_output=True, text=True, timeout=30)
        assert done.stdout == status, done.stderr


def test_bodies_together_have_a_limit_and_give_their_room_back():
    release, inside = threading.Event(), []

    async def waiting(scope, receive, send):
        inside.append(scope)
        await asyncio.to_thread(release.wait, PATIENCE)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    with guarded_port(waiting, max_body_bytes=MIB) as port:
        clients = [Client(port) for _ in range(16)]
        for client in clients:
            client.send(HEAD + b"Content-Length: %d\r\n\r\n" % MIB + bytes(MIB))
        wait_until(lambda: len(inside) == 16)
        assert ask(port, "POST", body=b"{}")[0] == 503
        release.set()
        assert [client.answer()[0] for client in clients] == [200] * 16
        assert ask(port, "POST", body=b"{}")[0] == 200


def test_one_connection_too_many_is_503_and_its_place_is_free_again_when_another_ends():
    with guarded_port(max_connections=3) as port:
        held = [Client(port) for _ in range(3)]
        assert "too many" in refused(Client(port), 503, "overloaded")
        held.pop().socket.close()
        wait_until(lambda: ask(port)[0] == 200)


def test_a_client_that_reads_nothing_of_its_answer_is_cut_off():
    ended = threading.Event()

    async def writing(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2000):
            await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
        ended.set()

    with guarded_port(writing, unread_seconds=0.3) as port:
        client = Client(port)
        client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(10)
        client.socket.close()


def test_clients_that_leave_anywhere_leave_nothing_behind(port):
    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    for cut in (b"", b"POST", HEAD, HEAD + b"Content-Length: 9\r\n\r\n", HEAD + b"Content-Length: 9\r\n\r\n123"):
        for reset in (False, True):
            client = Client(port)
            client.send(cut)
            if reset:
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.socket.close()
    wait_until(lambda: open_files() <= before)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "192.0.2.1", "x:y:z"]
)
def test_a_page_of_a_name_rebound_to_this_machine_gets_no_answer(port, host):
    status, headers, answer = ask(port, Host=f"{host}:{port}")
    assert status == 421 and "x-app" not in headers and answer["error"]["code"] == "unknown_host"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "[::1]", "chat.localhost", "localhost."])
def test_the_machines_own_names_are_answered(port, host):
    assert ask(port, Host=f"{host}:{port}")[0] == ask(port, Host=host)[0] == 200


def test_with_a_key_any_name_is_answered():
    with guarded_port(keys=["k"]) as port:
        assert ask(port, Host="chat.example.org", Authorization="Bearer k")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content_Type": ""}, 415),
        ({"Content_Type": "application/json; charset=utf-8"}, 200),
        ({"Content_Type": "Application/JSON"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "same-origin", "Origin": "https://chat.example.org"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({}, 200),
    ],
    ids=str,
)
def test_another_sites_page_cannot_drive_the_server(port, headers, status):
    filled = {name: value.format(port=port) for name, value in headers.items()}
    assert ask(port, "POST", "/v1/completions", b"{}", **filled)[0] == status


def test_a_browsers_question_before_it_sends_json_is_never_told_yes(port):
    headers = ask(port, "OPTIONS", Origin="https://evil.example", Access_Control_Request_Method="POST")[1]
    assert not [name for name in headers if name.startswith("access-control")]
