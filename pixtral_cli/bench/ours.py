"""This program as a contender: `Pixtral.load`, and its engine step by step."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch

from pixtral_cli.api import Pixtral
from pixtral_cli.bench.ceilings import wait
from pixtral_cli.bench.contender import PROMPT
from pixtral_cli.engine.engine import Engine
from pixtral_cli.engine.request import Failure, Request
from pixtral_cli.model.kernels import native


class Program:
    """See `contender.Program`."""

    def load(self, model: dict[str, Any], threads: int, context: int, batch: int) -> float:
        """Threads are torch's own: OMP_NUM_THREADS says how many, here as elsewhere. Each token is a pass."""
        begun = time.perf_counter()
        self._model = Pixtral.load(**model, max_batch_size=batch, max_length=context, speculative="off")
        return time.perf_counter() - begun

    def about(self) -> dict[str, Any]:
        return {
            "version": torch.__version__,
            "instructions": native.instructions(),
            "notes": self._model.notes,
        }

    @property
    def _engine(self) -> Engine:
        return self._model.engine

    def prefill(self, tokens: int) -> float:
        begun = time.perf_counter()
        self._engine.submit(Request(self._text(tokens), 1))
        self._run_until(lambda: not self._engine.busy)
        return time.perf_counter() - begun

    def decode(self, tokens: int, batch: int) -> float:
        engine = self._engine
        ids = [engine.submit(Request(self._text(PROMPT), tokens + 1)) for _ in range(batch)]
        left = dict.fromkeys(ids, tokens + 1)
        self._run_until(lambda: max(left.values()) <= tokens, left)
        already = batch * (tokens + 1) - sum(left.values())
        begun = time.perf_counter()
        self._run_until(lambda: not engine.busy, left)
        return (time.perf_counter() - begun) * batch * tokens / (batch * (tokens + 1) - already)

    def picture(self, width: int, height: int) -> float:
        model, device = self._engine.model, self._engine.model.device
        assert model.config.vision is not None
        pixels = torch.randn(model.config.vision.num_channels, height, width).to(device, model.dtype)
        with torch.inference_mode():
            wait(device)
            begun = time.perf_counter()
            model.encode_images([pixels])
            wait(device)
            return time.perf_counter() - begun

    def _text(self, length: int) -> tuple[int, ...]:
        """Random tokens: no two prompts begin alike, so nothing is known of one."""
        return tuple(random.choices(range(self._engine.model.config.text.vocab_size), k=length))

    def _run_until(self, done: Callable[[], bool], left: dict[int, int] | None = None) -> None:
        """Step by step; what is left to be chosen of each request is counted down. Raises what a request fails with."""
        while not done():
            for event in self._engine.step():
                if isinstance(event, Failure):
                    raise event.error
                if left is not None:
                    left[event.request_id] -= 1
