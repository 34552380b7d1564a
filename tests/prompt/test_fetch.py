"""Addresses are fetched politely and within limits; each way to fail has its own sentence."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pixtral_cli.prompt.errors import ImageFetchFailed, ImageTooLarge
from pixtral_cli.prompt.fetch import FetchLimits, fetch

PNG = b"\x89PNG\r\n\x1a\n" + bytes(1000)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        getattr(self, self.path.strip("/").split("?")[0].replace("%20", "_"))()

    def log_message(self, *args):
        pass

    def answer(self, status=200, kind="image/png", body=PNG, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def picture(self):
        agent = self.headers.get("User-Agent", "")
        self.answer() if agent and "urllib" not in agent else self.answer(403)

    a_b = picture

    def unlabelled(self):
        self.answer(kind="application/octet-stream")

    def mislabelled(self):
        self.answer(kind="text/html")

    def page(self):
        self.answer(kind="text/html; charset=utf-8", body=b"<html>")

    def moved(self):
        self.answer(302, body=b"", Location="/picture")

    def to_file(self):
        self.answer(302, body=b"", Location="file:///etc/hostname")

    def slow(self):
        time.sleep(1.5)

    def trickle(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(30):
            self.wfile.write(PNG[:8])
            self.wfile.flush()
            time.sleep(0.05)

    def cut(self):
        self.send_response(200)
        self.send_header("Content-Length", "5000")
        self.end_headers()
        self.wfile.write(PNG)


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("page", ["picture", "a b", "unlabelled", "mislabelled", "moved", "picture?x=ü"])
def test_a_picture_is_fetched(site, page):
    assert fetch(f"{site}/{page}") == PNG


@pytest.mark.parametrize(
    ("page", "reason", "connect", "total"),
    [
        ("page", "text/html", 10, 20),
        ("nothing", "closed connection", 10, 20),
        ("to_file", "file", 10, 20),
        ("cut", "1008 of 5000 bytes", 10, 20),
        ("slow", "within 0.3 seconds", 0.3, 20),
        ("trickle", "more than 0.5 seconds", 10, 0.5),
    ],
)
def test_each_failure_says_why(site, page, reason, connect, total):
    with pytest.raises(ImageFetchFailed, match=reason) as caught:
        fetch(f"{site}/{page}", FetchLimits(connect, total))
    assert page in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_missing_page_says_404(site, monkeypatch):
    monkeypatch.setattr(Handler, "gone", lambda self: self.answer(404), raising=False)
    with pytest.raises(ImageFetchFailed, match="404"):
        fetch(f"{site}/gone")


def test_a_download_has_a_limit(site):
    with pytest.raises(ImageTooLarge):
        fetch(f"{site}/picture", FetchLimits(max_bytes=1000))


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x.png", "http://", "http://[", "http://a b/", "http://no.invalid/x"]
)
def test_an_address_that_leads_nowhere_is_one_sentence(url):
    with pytest.raises(ImageFetchFailed) as caught:
        fetch(url, FetchLimits(2, 4))
    assert "\n" not in str(caught.value)
