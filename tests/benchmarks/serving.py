"""What HTTP costs: tokens per second of the engine itself, and of the same requests through `pixtral serve`.

    python tests/benchmarks/serving.py [--model-path FOLDER] [--quantization-encoding ENCODING] [--tokens 64]

The two sides alternate, each in its own process. Use a model of realistic size: with a checkpoint of 1.5 billion
parameters, HTTP should cost at most 5 %. On a shared machine, times say little; compare the
processor times, which are printed too.
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
import urllib.request
from collections.abc import Sequence

PROMPT = tuple(range(20, 60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default="tiny")
    parser.add_argument("--quantization-encoding", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    engine(options) if options.engine else compare(options)


def engine(options: argparse.Namespace) -> None:
    """Rates of the engine on standard output, one for each line of standard input that tells how many streams."""
    from pixtral_cli import Pixtral

    model = Pixtral.load(
        options.model_path, quantization_encoding=options.quantization_encoding, devices="cpu", max_batch_size=16
    )
    for line in sys.stdin:
        print(engine_rate(model.engine, int(line), options.tokens), flush=True)


def engine_rate(engine, streams: int, tokens: int) -> float:
    from pixtral_cli.engine.request import Request

    begun = time.perf_counter()
    for number in range(streams):
        engine.submit(Request((*PROMPT, 100 + number), tokens))
    while engine.busy:
        engine.step()
    return streams * tokens / (time.perf_counter() - begun)


def compare(options: argparse.Namespace) -> None:
    model = ["--model-path", options.model_path, "--quantization-encoding", options.quantization_encoding]
    port = free_port()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, __file__, *model, "--tokens", str(options.tokens), "--engine"]
    server = [sys.executable, "-m", "pixtral_cli", "serve", "--quiet", *model, "--devices", "cpu", "--port", str(port)]
    with subprocess.Popen(command, **pipes) as alone, subprocess.Popen([*server, "--served-model-name", "x"]) as served:
        try:
            wait_until_ready(port)
            for streams in options.streams:
                pairs = [pair(alone, served, port, streams, options.tokens) for _ in range(options.runs + 1)][1:]
                for what, each in zip(("tokens/s", "tokens per CPU second"), zip(*pairs, strict=True), strict=True):
                    tell(streams, what, each)
        finally:
            served.terminate()
            alone.stdin.close()


Rates = tuple[float, float]
"""Of the engine, and over HTTP."""


def pair(
    alone: subprocess.Popen, served: subprocess.Popen, port: int, streams: int, tokens: int
) -> tuple[Rates, Rates]:
    """Tokens a second, and tokens for each second that a processor was busy; one side right after the other."""

    def ask_engine() -> float:
        alone.stdin.write(f"{streams}\n")
        alone.stdin.flush()
        return float(alone.stdout.readline())

    rates, busy = [], []
    for process, ask in ((alone, ask_engine), (served, lambda: asyncio.run(http_rate(port, streams, tokens)))):
        before = processor_seconds(process.pid)
        rates.append(ask())
        busy.append(streams * tokens / (processor_seconds(process.pid) - before))
    return tuple(rates), tuple(busy)


def processor_seconds(pid: int) -> float:
    """Source: proc(5), fields 14 and 15 of /proc/pid/stat."""
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def tell(streams: int, what: str, pairs: Sequence[Rates]) -> None:
    engine, http = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    costs = sorted(1 - there / here for here, there in pairs)
    spread = f"{costs[0]:.1%} to {costs[-1]:.1%}"
    print(f"{streams} streams: engine {engine:.1f} {what}, HTTP {http:.1f}", end=": ")
    print(f"{statistics.median(costs):.1%} lost ({spread} in {len(pairs)} pairs)", flush=True)


async def http_rate(port: int, streams: int, tokens: int) -> float:
    begun = time.perf_counter()
    await asyncio.gather(*[stream(port, number, tokens) for number in range(streams)])
    return streams * tokens / (time.perf_counter() - begun)


async def stream(port: int, number: int, tokens: int) -> None:
    """Read one streamed answer, with as little work as can be: what the client takes is not the server's."""
    body = {"model": "x", "prompt": [*PROMPT, 100 + number], "max_tokens": tokens, "ignore_eos": True}
    data = json.dumps(body | {"stream": True, "temperature": 0, "stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    answer = await reader.read()
    writer.close()
    assert int(re.search(rb'"completion_tokens":(\d+)', answer)[1]) == tokens, answer[-500:]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_until_ready(port: int) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
                return
        except OSError:
            time.sleep(0.2)


if __name__ == "__main__":
    main()
