"""`pixtral serve --model-path tiny` as a process, for tests."""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.processes import PATIENCE, PROGRAM, clean_environment

JSON = {"Content-Type": "application/json"}


def hello(**more):
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0} | more


@dataclass
class Served:
    """A running server: its process, where it is, and what it has said so far."""

    process: subprocess.Popen
    errors: Path
    url: str = ""

    def said(self):
        return self.errors.read_text()

    def open(self, path, body=None, headers=(), timeout=60):
        """The response, whatever its status; a body is sent as JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, JSON | dict(headers))
        try:
            return urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            return error

    def json(self, path, body=None, headers=()):
        with self.open(path, body, headers) as response:
            return json.load(response)

    def events(self, **more):
        """A stream, opened: its events, without the empty lines, as they come."""
        response = self.open("/v1/chat/completions", hello(stream=True, **more))
        return (line.decode().removeprefix("data: ").strip() for line in response if line.strip())

    def wait_for(self, pattern, seconds=PATIENCE):
        """What matches in what the server says; it must come while the process lives."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.search(pattern, self.said())
            if found:
                return found
            assert self.process.poll() is None, self.said()
            time.sleep(0.01)
        raise AssertionError(f"{pattern!r} did not come: {self.said()}")

    def end(self, number=signal.SIGTERM, seconds=PATIENCE):
        """Send the signal -> exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def starting(*flags, command=PROGRAM, env=None):
    """The process, as soon as it runs; killed at the end if it still does. Its standard output must stay empty."""
    arguments = ["serve", "--model-path", "tiny", "--port", "0", *flags]
    with tempfile.NamedTemporaryFile() as errors, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*command, *arguments],
            env=clean_environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
        )
        try:
            yield Served(process, Path(errors.name))
            assert os.fstat(output.fileno()).st_size == 0
        finally:
            process.kill()
            process.wait()


@contextmanager
def served(*flags, **settings):
    """As `starting`, once the model is loaded."""
    with starting(*flags, **settings) as server:
        server.url = server.wait_for(r"address\s+(http://\S+)")[1]
        yield server
