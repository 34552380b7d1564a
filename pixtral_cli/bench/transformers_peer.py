"""transformers as a contender: the same weights as a Hugging Face folder, in the dtype that ours computes in.

Its model is called step by step, with its own cache of keys and values, logits of the last token only and the likeliest
token chosen: `generate` would add its own bookkeeping.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from pixtral_cli.bench.ceilings import wait
from pixtral_cli.bench.contender import PROMPT


class Program:
    """See `contender.Program`; a model is {"folder": path, "dtype", "device": torch's names}."""

    def load(self, model: dict[str, Any], threads: int, context: int, batch: int) -> float:
        begun = time.perf_counter()
        torch.set_num_threads(threads)
        folder, self._device = model["folder"], torch.device(model["device"])
        sees = "vision_config" in AutoConfig.from_pretrained(folder).to_dict()
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        loaded = kind.from_pretrained(folder, dtype=model["dtype"], local_files_only=True)
        self._model = loaded.eval().to(device=self._device)
        self._vocabulary = self._model.get_input_embeddings().num_embeddings
        return time.perf_counter() - begun

    def about(self) -> dict[str, Any]:
        return {"version": transformers.__version__, "attention": self._model.config._attn_implementation}

    def prefill(self, tokens: int) -> float:
        ids = self._ids(1, tokens)
        return self._seconds(lambda: self._step(ids, None))

    def decode(self, tokens: int, batch: int) -> float:
        chosen, cache = self._step(self._ids(batch, PROMPT), None)

        def run() -> None:
            token, known = chosen, cache
            for _ in range(tokens):
                token, known = self._step(token, known)

        return self._seconds(run)

    def picture(self, width: int, height: int) -> float:
        pixels = torch.randn(1, 3, height, width, dtype=self._model.dtype, device=self._device)
        sizes = torch.tensor([[height, width]])
        return self._seconds(lambda: self._model.get_image_features(pixel_values=pixels, image_sizes=sizes))

    def _ids(self, batch: int, tokens: int) -> Tensor:
        return torch.randint(20, self._vocabulary, (batch, tokens), device=self._device)

    @torch.inference_mode()
    def _step(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Token ids [B, N] -> the likeliest token after each [B, 1], and the cache."""
        out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1), out.past_key_values

    @torch.inference_mode()
    def _seconds(self, work: Callable[[], object]) -> float:
        wait(self._device)
        begun = time.perf_counter()
        work()
        wait(self._device)
        return time.perf_counter() - begun
