"""Many clients of a server at once: a number in, a request and what becomes of it out. Raw sockets, so that they can
be closed in every way at every moment.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from random import Random

from PIL import Image

CHAT = "/v1/chat/completions"
CLOSED_BY_SERVER = 0
SLOW_PICTURE = {"type": "image_url", "image_url": {"url": "http://example.org/slow.png"}}
"""For tests that stand in for what opens it."""
SYSTEM = "You look at pictures and say what is on them, in one short sentence, with colours and places. " * 3
WORDS = "what colour is the circle on left right above below square star how many shapes are there please".split()
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
ARGUMENTS = {"type": "object", "properties": {"a": NUMBER}, "required": ["a"], "additionalProperties": False}
ADD = {"type": "function", "function": {"name": "add", "parameters": ARGUMENTS}}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "shape",
        "schema": {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]},
    },
}


@dataclass(frozen=True)
class Planned:
    """A request, and where it is cut: None, or (moment, whether with a reset)."""

    path: str
    body: dict
    cut: tuple[str, bool] | None = None

    @property
    def data(self) -> bytes:
        body = json.dumps(self.body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


@dataclass
class Outcome:
    """What came of many requests."""

    statuses: Counter = field(default_factory=Counter)
    cuts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0


@cache
def picture(seed: int, width: int, height: int) -> str:
    """A data: URI; another seed gives other pixels."""
    random, file = Random(seed), BytesIO()
    image = Image.new("RGB", (width, height), tuple(random.randbytes(3)))
    image.paste(tuple(random.randbytes(3)), (width // 4, height // 4, width // 2, height // 2))
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def plan(number: int, *, cut_share: float = 0.2) -> Planned:
    """Request `number` of a mix; the same number always gives the same."""
    random = Random(number)
    body = {"model": "tiny", "temperature": random.choice([0, 0, 0.7]), "max_tokens": random.randint(1, 48)}
    body |= {"ignore_eos": random.random() < 0.5, "stream": random.random() < 0.5}
    path, question = CHAT, " ".join(random.choices(WORDS, k=random.choice([3, 12, 12, 400])))
    if random.random() < 0.1:
        path, body["prompt"] = "/v1/completions", question
    else:
        body["messages"] = _messages(random, question)
        body |= random.choice([{}, {}, {}, {"tools": [ADD], "tool_choice": "required"}, {"response_format": SCHEMA}])
    body |= random.choice([{}, {}, {"n": 2}, {"logprobs": 2 if "prompt" in body else True}])
    if body["stream"] and random.random() < 0.5:
        body["stream_options"] = {"include_usage": True}
    return Planned(path, body, _cut(random) if random.random() < cut_share else None)


def _messages(random: Random, question: str) -> list[dict]:
    system = [{"role": "system", "content": SYSTEM}] if random.random() < 0.5 else []
    seeds = [random.choice([1, 2, 3, random.randrange(10**6)]) for _ in range(random.choice([0, 0, 1, 1, 3]))]
    pictures = [picture(seed, random.choice([32, 100, 256]), random.choice([32, 256])) for seed in seeds]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content = [*parts, {"type": "text", "text": question}] if parts else question
    return [*system, {"role": "user", "content": content}]


def _cut(random: Random) -> tuple[str, bool]:
    return random.choice(["in the body", "at once", "soon", "later", "in the answer"]), random.random() < 0.5


async def many(port: int, numbers: range, clients: int = 64, cut_share: float = 0.2) -> Outcome:
    """Have so many clients ask at once until all of the mix's `numbers` are asked."""
    outcome, left = Outcome(), iter(numbers)

    async def client() -> None:
        for number in left:
            planned = plan(number, cut_share=cut_share)
            try:
                async with asyncio.timeout(120):
                    await _ask(port, planned, Random(-number), outcome)
            except Exception as error:  # noqa: BLE001  whatever a client meets is told
                outcome.wrong.append(f"{number}: {type(error).__name__}: {error}")

    await asyncio.gather(*[client() for _ in range(clients)])
    return outcome


async def _ask(port: int, planned: Planned, random: Random, outcome: Outcome) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    moment, resets = planned.cut or (None, False)
    try:
        data = planned.data
        writer.write(data[: -len(data) // 3] if moment == "in the body" else data)
        await writer.drain()
        if moment is None:
            _check(planned, await reader.read(), outcome)
        else:
            outcome.cuts[f"{moment}, {'reset' if resets else 'closed'}"] += 1
            await _wait_for_moment(moment, reader, random)
    finally:
        if resets:
            option = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
            writer.transport.abort()
        writer.close()


async def _wait_for_moment(moment: str, reader: asyncio.StreamReader, random: Random) -> None:
    if moment == "in the answer":
        for _ in range(random.randint(1, 12)):
            await reader.readline()
    else:
        await asyncio.sleep({"soon": random.random() * 0.1, "later": random.random() * 2}.get(moment, 0))


def _check(planned: Planned, data: bytes, outcome: Outcome) -> None:
    head, _, rest = data.partition(b"\r\n\r\n")
    status = int(head.split()[1]) if head else CLOSED_BY_SERVER
    outcome.statuses[status] += 1
    assert status == 200, data[:1000]
    if b"transfer-encoding: chunked" in head.lower():
        rest = _whole(rest)
    if planned.body["stream"]:
        _check_stream(planned, rest)
    else:
        answer = json.loads(rest)
        outcome.tokens += answer["usage"]["completion_tokens"]
        _check_ends(planned, [choice["finish_reason"] for choice in answer["choices"]])


def _check_stream(planned: Planned, data: bytes) -> None:
    *events, done, nothing = data.decode().split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    _check_ends(planned, [choice["finish_reason"] for choice in choices if choice["finish_reason"]])


def _check_ends(planned: Planned, reasons: list[str]) -> None:
    assert len(reasons) == planned.body.get("n", 1) and set(reasons) <= {"stop", "length", "tool_calls"}, reasons


def _whole(chunked: bytes) -> bytes:
    """The body of a chunked answer. Fails where it breaks off."""
    data, place = b"", 0
    while True:
        end = chunked.index(b"\r\n", place)
        size = int(chunked[place:end], 16)
        if size == 0:
            return data
        place = end + 2 + size + 2
        data += chunked[end + 2 : place - 2]
        assert chunked[place - 2 : place] == b"\r\n"
