"""llama.cpp as a contender, through the C functions that llama-cpp-python binds: no sampler in Python is on the way.

It has what makes it fastest here: as many threads as ours, its defaults of flash attention (auto), weights in its own
order where it has one (repacking), mapped files, 512 tokens and more a pass; logits of the last token only.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as c
from llama_cpp import mtmd_cpp as mtmd

from pixtral_cli.bench.contender import PROMPT

MOST_TOKENS = 2**16
"""Of a picture: llama.cpp would make larger ones smaller, to 1024 tokens."""


class LlamaCppFailed(Exception):
    """A function of llama.cpp gave no result."""


class Program:
    """See `contender.Program`; a model is {"gguf": path}, and of one that sees "mmproj" and "vocabulary"."""

    def __init__(self) -> None:
        self._context: Any = None
        self._sequences = 0
        self._tower: Tower | None = None

    def load(self, model: dict[str, Any], threads: int, context: int, batch: int) -> float:
        begun = time.perf_counter()
        c.llama_backend_init()
        self._files, self._threads, self._length = model, threads, context
        wanted = c.llama_model_default_params()
        wanted.load_mode = getattr(c, "LLAMA_LOAD_MODE_MMAP", None)  # older versions map files by default
        self._model = c.llama_model_load_from_file(model["gguf"].encode(), wanted)
        if not self._model:
            raise LlamaCppFailed(f"{model['gguf']} cannot be loaded")
        self._vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self._for(1)
        return time.perf_counter() - begun

    def about(self) -> dict[str, Any]:
        return {"version": llama_cpp.__version__, "instructions": c.llama_print_system_info().decode().strip()}

    def prefill(self, tokens: int) -> float:
        self._for(1)
        batch = self._batch([(place, 0, place == tokens - 1) for place in range(tokens)])
        begun = time.perf_counter()
        self._decode(batch)
        found = time.perf_counter() - begun
        c.llama_batch_free(batch)
        return found

    def decode(self, tokens: int, batch: int) -> float:
        self._for(batch)
        sequences = range(batch)
        prompt = self._batch([(place, one, place == PROMPT - 1) for one in sequences for place in range(PROMPT)])
        self._decode(prompt)
        step = self._batch([(PROMPT, one, True) for one in sequences])
        begun = time.perf_counter()
        for place in range(PROMPT, PROMPT + tokens):
            for one in sequences:
                step.pos[one] = place
            self._decode(step)
        found = time.perf_counter() - begun
        c.llama_batch_free(prompt)
        c.llama_batch_free(step)
        return found

    def picture(self, width: int, height: int) -> float:
        if self._tower is None:
            self._tower = Tower(self._files["mmproj"], self._files["vocabulary"], self._threads)
        return self._tower.picture(width, height)[1]

    def _for(self, sequences: int) -> None:
        """A context for so many sequences, with nothing in it."""
        if self._sequences != sequences:
            if self._context:
                c.llama_free(self._context)
            wanted = c.llama_context_default_params()
            wanted.n_ctx = sequences * -(-self._length // 256) * 256  # which it rounds up to itself
            wanted.n_seq_max = sequences
            wanted.n_threads = wanted.n_threads_batch = self._threads
            self._context = c.llama_init_from_model(self._model, wanted)
            self._sequences = sequences
            if not self._context:
                raise LlamaCppFailed("no context could be made")
        c.llama_memory_clear(c.llama_get_memory(self._context), False)

    def _batch(self, places: Sequence[tuple[int, int, bool]]) -> Any:
        """Random tokens: position, sequence and whether logits are wanted, of each."""
        batch = c.llama_batch_init(len(places), 0, 1)
        batch.n_tokens = len(places)
        for row, (place, sequence, logits) in enumerate(places):
            batch.token[row] = random.randrange(self._vocabulary)
            batch.pos[row], batch.n_seq_id[row], batch.seq_id[row][0] = place, 1, sequence
            batch.logits[row] = logits
        return batch

    def _decode(self, batch: Any) -> None:
        if code := c.llama_decode(self._context, batch):
            raise LlamaCppFailed(f"llama_decode gave {code}")
        c.llama_synchronize(self._context)
        c.llama_get_logits_ith(self._context, -1)


class Tower:
    """mtmd, llama.cpp's reader of pictures, with an mmproj file; `vocabulary` is a GGUF without weights."""

    def __init__(self, mmproj: str, vocabulary: str, threads: int) -> None:
        wanted = c.llama_model_default_params()
        wanted.vocab_only = True
        self._text = c.llama_model_load_from_file(vocabulary.encode(), wanted)
        settings = mtmd.mtmd_context_params_default()
        settings.use_gpu, settings.print_timings, settings.warmup = False, False, False
        settings.n_threads = threads
        settings.image_max_tokens = MOST_TOKENS
        self._context = self._text and mtmd.mtmd_init_from_file(mmproj.encode(), self._text, settings)
        if not self._context:
            raise LlamaCppFailed(f"{mmproj} cannot be loaded")

    def picture(self, width: int, height: int) -> tuple[int, float]:
        """Features of a picture of random pixels: how many, and the seconds that encoding took."""
        pixels = (ctypes.c_uint8 * (3 * width * height)).from_buffer_copy(random.randbytes(3 * width * height))
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels)
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            marker = mtmd.mtmd_default_marker()
            text = mtmd.mtmd_input_text(marker, len(marker), False, True)
            bitmaps = (ctypes.c_void_p * 1)(bitmap)
            if code := mtmd.mtmd_tokenize(self._context, chunks, ctypes.byref(text), bitmaps, 1):
                raise LlamaCppFailed(f"mtmd_tokenize gave {code}")
            return self._encode(chunks)
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _encode(self, chunks: Any) -> tuple[int, float]:
        places = range(mtmd.mtmd_input_chunks_size(chunks))
        found = [mtmd.mtmd_input_chunks_get(chunks, place) for place in places]
        [chunk] = [each for each in found if mtmd.mtmd_input_chunk_get_type(each) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE]
        begun = time.perf_counter()
        if code := mtmd.mtmd_encode_chunk(self._context, chunk):
            raise LlamaCppFailed(f"mtmd_encode_chunk gave {code}")
        return mtmd.mtmd_input_chunk_get_n_tokens(chunk), time.perf_counter() - begun
