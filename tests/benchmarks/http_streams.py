"""Streams of answers from a server, all at once, read as cheaply as can be: tokens a second while all of them run.

    python tests/benchmarks/http_streams.py PORT STREAMS TOKENS CONTEXT VOCABULARY

Prints JSON: `rate` in tokens a second from the moment when every stream has begun to that when the first ends, `tokens`
and `seconds` of all. A process of its own, so that what the clients take is not the server's.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import time

Arrivals = list[tuple[float, int]]
"""When bytes came, and how many events had come by then."""


async def main(port: int, streams: int, tokens: int, context: int, vocabulary: int) -> None:
    begun = time.perf_counter()
    told = await asyncio.gather(*[stream(port, tokens, prompt(context, vocabulary)) for _ in range(streams)])
    seconds = time.perf_counter() - begun
    since, until = max(each[0][0] for each in told), min(each[-1][0] for each in told)
    if until <= since:
        raise SystemExit("the first stream ended before the last began: ask for more tokens")
    within = sum(at(until, each) - at(since, each) for each in told)
    print(json.dumps({"rate": within / (until - since), "tokens": streams * tokens, "seconds": seconds}))


def prompt(context: int, vocabulary: int) -> list[int]:
    """Random, so that no two prompts have anything in common."""
    return [random.randrange(20, vocabulary) for _ in range(context)]


def at(moment: float, arrivals: Arrivals) -> int:
    return max((count for when, count in arrivals if when <= moment), default=0)


async def stream(port: int, tokens: int, ids: list[int]) -> Arrivals:
    """Read one answer to its end; each token is one event, but for those that write nothing."""
    body = {"model": "x", "prompt": ids, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    arrivals, events, last = [], 0, b""
    while piece := await reader.read(65536):
        if events := events + piece.count(b"data: "):
            arrivals.append((time.perf_counter(), events))
        last = (last + piece)[-2000:]
    writer.close()
    found = re.search(rb'"completion_tokens":(\d+)', last)
    if found is None or int(found[1]) != tokens:
        raise SystemExit(f"the answer is not whole: {last[-500:]!r}")
    return [(when, count * tokens // events) for when, count in arrivals]


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
