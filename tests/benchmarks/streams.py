"""What streaming costs: an engine that computes nothing, and many clients of its server at once. Needs no card.

    python tests/benchmarks/streams.py [--streams 64] [--tokens 400] [--step-ms 10] [--python-ms 3] [--body JSON]

The stand-in engine gives every request a token in each step of `step-ms`, as a card would: it computes by itself, and
the engine's thread needs the interpreter for `python-ms` to launch a step and to read the one before, and lets go of it
`switches` times on the way, as operations of torch do. All else is what `pixtral serve` runs: the driver, the text, the
HTTP server, in a process of its own. Its clients are another process.

Printed are tokens a second while all streams run, beside those of the same engine whose events nobody reads, and the
processor time for a token of each of the server's threads, less `python-ms`: on a busy machine that says more. Last
comes how long the engine's thread waited in each step, for the interpreter or a processor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

TEXT = "The river bends twice before the old mill, where three boats wait under the willows for rain. "
WARM = 24
"""Tokens of every stream before the measuring begins."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=10)
    parser.add_argument("--python-ms", type=float, default=3)
    parser.add_argument("--switches", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--body", type=json.loads, default={}, help="more fields of the requests")
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    serve(options) if options.server else measure(options)


# The server's side


class StandIn:
    """Has what a driver and a service need of an engine, and the tokens of a text instead of a model's."""

    def __init__(self, engine: Any, options: argparse.Namespace, text: list[int]) -> None:
        self.engine, self.max_batch_size, self.text = engine, options.streams, text
        self.step_s, self.python_s, self.switches = options.step_ms / 1e3, options.python_ms / 1e3, options.switches
        self.waits: list[float] = []  # seconds of each step that were lost
        self.scheduler = self
        self.preemptions = 0
        self.sequences: dict[int, Any] = {}
        self.ready_at = 0.0  # when the card is done with the step that was launched last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @property
    def running(self) -> list[Any]:
        return list(self.sequences.values())

    waiting = ()

    @property
    def busy(self) -> bool:
        return bool(self.sequences)

    def add(self, sequence: Any) -> None:
        self.sequences[sequence.id] = sequence

    def cancel(self, request_id: int) -> None:
        self.sequences.pop(request_id, None)

    remove = cancel

    def step(self) -> list[Any]:
        """Launch a step behind the one under way, wait for that one, give its tokens."""
        begun = time.perf_counter()
        for _ in range(self.switches):
            hold_interpreter(self.python_s / self.switches)
            time.sleep(0)
        launched = time.perf_counter()
        done, self.ready_at = self.ready_at, max(self.ready_at, launched) + self.step_s
        time.sleep(max(done - launched, 0))
        self.waits.append(launched - begun - self.python_s + time.perf_counter() - max(done, launched))
        return [self.event(sequence) for sequence in self.running]

    def event(self, sequence: Any) -> Any:
        from pixtral_cli.engine.request import TokenEvent

        place = len(sequence.token_ids)
        sequence.token_ids.append(self.text[(place + sequence.id) % len(self.text)])
        alternatives = ((1, -1.5), (2, -2.5))[: sequence.request.logprobs or 0]
        logprob = None if sequence.request.logprobs is None else -0.5
        return TokenEvent(sequence.id, sequence.token_ids[-1], sequence.finish_reason, logprob, alternatives)


def hold_interpreter(seconds: float) -> None:
    """Work of Python's, which takes so much time of a processor."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def serve(options: argparse.Namespace) -> None:
    """Print the port, measure the engine alone for each line of standard input, serve until the end."""
    from pixtral_cli.api import Pixtral
    from pixtral_cli.server import process
    from pixtral_cli.server.media_policy import MediaPolicy
    from pixtral_cli.server.service import Limits

    tiny = Pixtral.load("tiny", devices="cpu")
    text = tiny.processor.tokenizer.encode(TEXT)
    engine = StandIn(tiny.engine, options, text)
    model: Any = Pixtral(tiny.source, tiny.placement, engine, 0.0)  # type: ignore[arg-type]
    print(alone(model.driver, options.streams, options.tokens), flush=True)
    listener = process.listen("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    settings = process.Settings("127.0.0.1", ("x",), Limits(), MediaPolicy())
    terminal = process.Terminal(lambda line: None, print, os._exit)
    engine.waits.clear()
    process.serve(listener, lambda: process.assemble(model, settings, ""), 0, terminal)
    print(
        f"the engine's thread waited for {statistics.median(engine.waits) * 1e3:.2f} ms of a step (median)", flush=True
    )


def alone(driver: Any, streams: int, tokens: int) -> float:
    """Tokens a second whose events nobody reads."""
    from threading import Semaphore

    from pixtral_cli.engine.request import Request

    ended, begun = Semaphore(0), time.perf_counter()

    def sink(events: list[Any]) -> None:
        for _ in filter(lambda event: event.finish_reason, events):
            ended.release()

    for _ in range(streams):
        driver.submit(Request((1, 2, 3), tokens), sink)
    for _ in range(streams):
        ended.acquire()
    return streams * tokens / (time.perf_counter() - begun)


# The clients' side


@dataclass(frozen=True)
class Reading:
    """At `time`, so many events had come to all clients, and the threads had used so many seconds of a processor."""

    time: float
    events: int
    http: float
    engine: float


class Client(asyncio.Protocol):
    """One stream; counts its events, and does nothing else."""

    def __init__(self, request: bytes) -> None:
        self.request, self.events, self.answer = request, 0, b""
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: ")
        self.answer = data

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)


def measure(options: argparse.Namespace) -> None:
    command = [sys.executable, __file__, *sys.argv[1:], "--server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            engine_rate, port = float(server.stdout.readline()), int(server.stdout.readline())
            wait_until_ready(port)
            print(f"engine alone: {engine_rate:.0f} tokens/s")
            for _ in range(options.runs):
                tell(asyncio.run(readings(server.pid, port, options)), engine_rate, options)
        finally:
            server.terminate()
        print(server.stdout.read().strip())


def tell(seen: list[Reading], engine_rate: float, options: argparse.Namespace) -> None:
    first, last = seen[0], seen[-1]
    tokens, seconds = last.events - first.events, last.time - first.time
    http, engine = (
        (late - early) / tokens * 1e6 for early, late in ((first.http, last.http), (first.engine, last.engine))
    )
    engine -= options.python_ms * 1e3 / options.streams
    print(
        f"{options.streams} streams: {tokens / seconds:.0f} tokens/s, {tokens / seconds / engine_rate:.0%}; CPU for a "
        f"token: {http + engine:.1f} us (event loop {http:.1f}, engine's thread {engine:.1f})",
        flush=True,
    )


async def readings(pid: int, port: int, options: argparse.Namespace) -> list[Reading]:
    """Of the time in which all streams run."""
    clients, loop = [], asyncio.get_running_loop()
    for _ in range(options.streams):
        request = post("/v1/chat/completions", chat(options.tokens, options.body))
        clients.append((await loop.create_connection(partial(Client, request), "127.0.0.1", port))[1])
    seen = []
    while not any(client.ended.done() for client in clients):
        await asyncio.sleep(0.05)
        events = [client.events for client in clients]
        if min(events) > WARM and not any(client.ended.done() for client in clients):
            seen.append(Reading(time.perf_counter(), sum(events), *processor_seconds(pid)))
    await asyncio.gather(*[client.ended for client in clients])
    for client in clients:
        assert client.events > options.tokens / 2, client.answer
    return seen


def chat(tokens: int, more: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me of the river."}]
    return {"model": "x", "messages": messages, "max_tokens": tokens, "stream": True, "ignore_eos": True} | more


def post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def processor_seconds(pid: int) -> tuple[float, float]:
    """Of the process's first thread, which runs the event loop, and of all others: for streams, the engine's.

    Source: the kernel's Documentation/scheduler/sched-stats.rst; a thread that has ended takes its time along.
    """
    used = {task.name: int((task / "schedstat").read_text().split()[0]) / 1e9 for task in threads(pid)}
    return used.pop(str(pid)), sum(used.values())


def threads(pid: int) -> Iterator[Path]:
    return Path(f"/proc/{pid}/task").iterdir()


def wait_until_ready(port: int) -> None:
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if re.match(rb"HTTP/1.1 200", connection.recv(64)):
                    return
        except OSError:
            pass
        time.sleep(0.1)


if __name__ == "__main__":
    main()
