"""A Hub on localhost for tests: speaks what huggingface_hub (2.4) really asks, and misbehaves on demand.

GET  /api/models/{repo}/revision/{revision}?blobs=True   the listing with sizes
HEAD /{repo}/resolve/{commit}/{file}                     length, ETag, X-Repo-Commit
GET  the same                                            the bytes, from an offset if a Range asks so
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>.+)")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<commit>[^/]+)/(?P<file>.+)")


@dataclass
class Fault:
    """What goes wrong: a status instead of an answer, a body that stops after `cut` bytes, one in which the last
    byte is another (`alter`), one that comes in pieces of 10,000 bytes with `drip` seconds between them,
    or an answer that begins after `wait` seconds."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    wait: float = 0.0
    alter: bool = False
    drip: float = 0.0


LARGE = (".safetensors", ".gguf", ".bin")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sibling(name: str, content: bytes) -> dict:
    """What the listing says of a file: large ones have the hash of their content beside git's of their pointer."""
    found = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
    if name.endswith(LARGE):
        found |= {"blobId": "0" * 40, "lfs": {"sha256": sha256(content), "size": len(content), "pointerSize": 130}}
    return found


@dataclass
class FakeHub:
    """`repos`: name -> file -> bytes; `fault` decides by (method, path) whether an answer goes wrong."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    fault: Callable[[str, str], Fault | None] = lambda method, path: None
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    listed: dict[str, bytes] = field(default_factory=dict)
    """Files whose content the listing describes otherwise than it is served."""
    ranges: bool = True
    prefix: str = ""
    """Where on the server the Hub begins."""
    targets: list[str] = field(default_factory=list)
    """What stood after GET and HEAD: paths, or whole URLs when the client takes this server for its proxy."""

    def commit(self, repo: str) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.repos[repo].items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for, in order."""
        return [m["file"] for method, path, _ in self.requests if method == "GET" and (m := FILE.fullmatch(path))]


@contextmanager
def serving(hub: FakeHub):  # noqa: C901  one handler has all that a Hub does
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self) -> None:
            self._serve()

        def do_CONNECT(self) -> None:
            hub.targets.append(self.path)
            self._answer(502, {})

        def do_GET(self) -> None:
            self._serve()

        def log_message(self, *args: object) -> None:
            pass

        def _serve(self) -> None:
            hub.targets.append(self.path)
            path = unquote(urlsplit(self.path).path)
            path = path.removeprefix(hub.prefix) if path.startswith(hub.prefix) else "/elsewhere"
            hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
            fault = hub.fault(self.command, path) or Fault()
            threading.Event().wait(fault.wait)  # not time.sleep, which tests replace
            if fault.status:
                return self._answer(fault.status, fault.headers)
            if match := API.fullmatch(path):
                return self._listing(match["repo"], match["revision"])
            match = FILE.fullmatch(path)
            content = hub.repos.get(match["repo"], {}).get(match["file"]) if match else None
            if content is None:
                return self._answer(404, {"X-Error-Code": "EntryNotFound"})
            return self._file(match["repo"], match["file"], content, fault)

        def _listing(self, repo: str, revision: str) -> None:
            if repo not in hub.repos:
                return self._answer(401, {"X-Error-Code": "RepoNotFound"})
            if revision not in ("main", "v1", hub.commit(repo)):
                return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            listed = {name: hub.listed.get(name, content) for name, content in hub.repos[repo].items()}
            siblings = [sibling(name, content) for name, content in listed.items()]
            body = json.dumps({"id": repo, "sha": hub.commit(repo), "siblings": siblings}).encode()
            return self._answer(200, {"Content-Type": "application/json"}, body)

        def _file(self, repo: str, name: str, content: bytes, fault: Fault) -> None:
            etag = sha256(content) if name.endswith(LARGE) else git_sha1(content)
            headers = {"X-Repo-Commit": hub.commit(repo), "ETag": f'"{etag}"'}
            content = content[:-1] + bytes([content[-1] ^ 1]) if fault.alter else content
            if hub.ranges and (asked := self.headers.get("Range")):
                start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
                start, end = int(start), min(int(end or len(content)) + 1, len(content))
                if start >= len(content):
                    return self._answer(416, {"Content-Range": f"bytes */{len(content)}"})
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
                return self._answer(206, headers, content[start:end], fault.cut, fault.drip)
            return self._answer(200, headers, content, fault.cut, fault.drip)

        def _answer(
            self, status: int, headers: dict[str, str], body: bytes = b"", cut: int | None = None, drip: float = 0.0
        ) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                body_sent = body if cut is None else body[:cut]
                for start in range(0, len(body_sent), 10_000) if drip else ():
                    self.wfile.write(body_sent[start : start + 10_000])
                    threading.Event().wait(drip)
                if not drip:
                    self.wfile.write(body_sent)
            if cut is not None and self.command == "GET":
                self.close_connection = True
                self.connection.shutdown(1)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda request, address: None  # a client that hangs up is no news
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
