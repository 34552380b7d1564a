"""`pixtral` with a model that answers as the prompt orders: for tests of streams, signals and exit codes.

Run as a script in place of the command. The answer is the request as the model would get it, word by word,
unless the prompt is one of ORDERS. FAKE_LOAD_S is how long loading takes, in seconds; FAKE_LOAD_FIFO names a pipe
that loading opens and reads to its end. FAKE_INTERRUPT_AT names a module at whose import the process gets Ctrl-C.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pixtral_cli


def _plain(turn):
    return "".join(getattr(chunk, "text", "[picture]") for chunk in turn.parts)


def _slowly(_):
    for number in range(10_000):
        time.sleep(0.02)
        yield f"word{number} "


def _failing(error):
    def order(_):
        yield "begun"
        raise error

    return order


def _interrupted_in_exec(_):
    yield "begun"
    exec("import os, signal; os.kill(os.getpid(), signal.SIGINT)")


def _swallowing(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001  as imports of large libraries do
        yield "begun"
    time.sleep(60)


class InterruptAt:
    """An import hook that sends this process Ctrl-C when a module of that name is looked for."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            os.kill(os.getpid(), signal.SIGINT)


ORDERS = {
    "interrupted in exec": _interrupted_in_exec,
    "swallowing": _swallowing,
    "slowly": _slowly,
    "bug": _failing(ZeroDivisionError("division by zero")),
    "memory": _failing(MemoryError()),
    "escape": lambda _: iter(["\x1b]0;owned\x07", "red\x1b[31m", "\x9b2J", "plain\n"]),
    "newline": lambda _: iter(["ends with one\n"]),
    "infinite": lambda _: iter(["x"]),
}


THOUGHT = ["Well", "\x1b[31m, then.\n"]


class FakePixtral:
    """The Pixtral of the Python API, as far as the commands use it."""

    notes, kernels = (), "none at all"

    @classmethod
    def load(cls, model_path, **arguments):
        time.sleep(float(os.environ.get("FAKE_LOAD_S", "0")))
        if fifo := os.environ.get("FAKE_LOAD_FIFO"):
            Path(fifo).read_bytes()
        model = cls()
        model.name, model.arguments, model.processor = model_path, arguments, SimpleNamespace()
        if arguments["progress"]:
            for done in range(0, 101, 20):
                arguments["progress"]("weights [1/1]", done, 100)
        return model

    def system_message(self):
        return {"role": "system", "content": "own"}

    def stream(self, messages, **options):
        from pixtral_cli.prompt.messages import parse

        turns = parse(messages).messages
        seen = "".join(f"<{turn.role}>{_plain(turn)}" for turn in turns)
        return self._events(_plain(turns[-1]), seen, options)

    def stream_complete(self, prompt, images, **options):
        return self._events(prompt, "[picture]" * len(images) + prompt, options)

    def _events(self, prompt, seen, options):
        words = ORDERS.get(prompt, lambda text: iter([text]))(seen)
        said, thought = [], THOUGHT if prompt == "thinking" else []
        for part in thought:
            yield SimpleNamespace(text="", reply=None, reasoning_content=part)
        for word in words:
            said.append(word)
            yield SimpleNamespace(text=word, reply=None, reasoning_content="")
        if prompt == "options":
            said = [json.dumps(options | self.arguments, default=str)]
            yield SimpleNamespace(text=said[0], reply=None, reasoning_content="")
        yield SimpleNamespace(
            text="", reasoning_content="", reply=self._reply(said, thought, options, prompt == "infinite")
        )

    def _reply(self, said, thought, options, infinite):
        logprob = SimpleNamespace(token_id=7, token="x", logprob=-0.5, top=())
        return SimpleNamespace(
            model=self.name,
            text="".join(said),
            token_ids=[7, 2],
            prompt_token_ids=[1, 3, 4],
            finish_reason="stop",
            usage=SimpleNamespace(
                prompt_tokens=3,
                completion_tokens=2,
                image_tokens=0,
                proposed_tokens=3,
                accepted_tokens=1,
                reasoning_tokens=0,
            ),
            timings=SimpleNamespace(
                load_s=0.1,
                first_token_s=0.2,
                prefill_tokens_per_s=float("inf") if infinite else 15.0,
                decode_tokens_per_s=20.0,
                total_s=0.3,
            ),
            logprobs=[logprob] if options["logprobs"] else None,
            reasoning_content="".join(thought),
        )


if __name__ == "__main__":
    if "FAKE_INTERRUPT_AT" in os.environ:
        sys.meta_path.insert(0, InterruptAt(os.environ["FAKE_INTERRUPT_AT"]))
    pixtral_cli.Pixtral = FakePixtral
    from pixtral_cli.__main__ import main

    main()
