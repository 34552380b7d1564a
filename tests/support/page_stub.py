"""A server for the chat page alone: the real page, a made-up model that writes slowly. No engine, no torch."""

import asyncio
import json
import threading

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pixtral_cli.server.middleware import SecurityHeaders
from pixtral_cli.server.static_files import routes

USAGE = {
    "prompt_tokens": 1234,
    "completion_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 100, "image_tokens": 1000},
}


class Stub:
    """What it answers is set by the test: `words` with `pause` seconds before each, `error`, `key`, `ending`."""

    def __init__(self):
        self.reset()
        app = Starlette(
            routes=[
                *routes(),
                Route("/v1/models", self.models),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )
        self.app = SecurityHeaders(app)  # what the browser is held to

    def reset(self):
        self.words = ["One", " picture", " says", " more."]
        self.thoughts = []  # what is thought before the words
        self.pause = 0.0
        self.allowed = float("inf")  # how many pieces of the stream may go out by now
        self.error = None  # (status, sentence)
        self.key = None
        self.ending = (
            "stop"  # or "length"; or "lost", the connection breaks, or "silent", it closes as if all were said
        )
        self.pieces = None  # bytes of the wire, each sent on its own, instead of `words`
        self.asked = []  # bodies of chat completions
        self.priced = []  # bodies of /tokenize
        self.left = threading.Event()  # the client went away in the middle

    def refusal(self, request: Request):
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return failed(401, "This key is not one of the server's.")
        return None

    async def models(self, request):
        return self.refusal(request) or JSONResponse({"data": [{"id": "stub-12b", "max_model_len": 131072}]})

    async def tokenize(self, request):
        self.priced.append(json.loads(await request.body()))
        content = self.priced[-1]["messages"][0]["content"]
        images = [{"width": 64, "height": 64, "tokens": 1000 + index} for index, _ in enumerate(content)]
        answer = {"tokens": [], "count": 0, "max_model_len": 131072, "images": images}
        return self.refusal(request) or JSONResponse(answer)

    async def chat(self, request) -> Response:
        self.asked.append(json.loads(await request.body()))
        if self.error:
            return failed(*self.error)
        return self.refusal(request) or StreamingResponse(self.wire(), media_type="text/event-stream")

    async def wire(self):
        try:
            for index, piece in enumerate(self.pieces or self.events()):
                await asyncio.sleep(self.pause)
                while index >= self.allowed:  # noqa: ASYNC110  set by the test, on another thread
                    await asyncio.sleep(0.01)
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise
        if self.ending == "lost":
            raise ConnectionResetError("the stub cuts the line")

    def events(self):
        for thought in self.thoughts:
            yield event({"choices": [{"index": 0, "delta": {"reasoning_content": thought}, "finish_reason": None}]})
        for word in self.words:
            yield event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
        if self.ending in ("lost", "silent"):
            return
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": self.ending}]})
        yield event({"choices": [], "usage": USAGE})
        yield b"data: [DONE]\n\n"


def event(chunk):
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


def failed(status, sentence):
    error = {"message": sentence, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)
