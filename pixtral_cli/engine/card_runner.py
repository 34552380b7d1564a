"""Chunks of sequences in, logits out, on a GPU: as `runner`, but nothing waits for the host, and decoding is one
captured CUDA graph.

What a pass needs of the sequences is kept on the card, a row for each seat: the pages in which it lies, and the token
that was chosen last. Letters: N rows of a pass, V vocab_size.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pixtral_cli.engine.runner import Computed, ImageFeatures, Runner, ends_of
from pixtral_cli.engine.scheduler import Chunk
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.engine.speculation import MOST_ROWS
from pixtral_cli.engine.transfers import to_device
from pixtral_cli.model.attention import AttendOnCard
from pixtral_cli.model.kernels import KernelLinear
from pixtral_cli.model.kernels.reference import ReferenceKernel
from pixtral_cli.model.kv_cache import KVCache, Layout, pages_for
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.pass_sizes import GRAPH_ROWS

WARMING_PASSES = 2  # before a pass is captured: kernels are compiled, and cuBLAS takes its workspace
logger = logging.getLogger(__name__)


class DecodeGraph(NamedTuple):
    """A captured pass. `inputs`, int32, are the seat and the position of the token of each row [2, N]; with proposals
    also the token [3, N]."""

    inputs: Tensor
    graph: torch.cuda.CUDAGraph


class CardRunner(Runner):
    """Decodes by CUDA graphs, one for each number of rows, captured when it is first needed.

    A token that was chosen stays on the card as the input of the next step, so that a step can be launched before the
    one before it was read.
    """

    steps_ahead = 1

    def __init__(
        self, model: LanguageModel, kv_cache: KVCache, features: ImageFeatures, max_batch_size: int, max_length: int
    ) -> None:
        super().__init__(model, kv_cache, features, exact=False)
        assert kv_cache.scratch_page is not None, "a cache on a card has one"
        rows, pages = max_batch_size + 1, pages_for(max_length)  # the last row is that of padding
        self._page_table = torch.full((rows, pages), kv_cache.scratch_page, dtype=torch.int32, device=self.device)
        self._last_tokens = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._written: list[tuple[list[int], int]] = [([], 0)] * max_batch_size
        """Of each seat, the list of pages that was written last, and how many of it."""
        self._buckets = [*(each for each in GRAPH_ROWS if each < max_batch_size), max_batch_size]
        most = max(max_batch_size, MOST_ROWS)
        self._logits = torch.empty(most, model.config.text.vocab_size, device=self.device)
        self._graphs: dict[int, DecodeGraph | None] = dict.fromkeys(() if _is_short(model) else self._buckets)
        self._proposing: dict[int, DecodeGraph | None] = {} if _is_short(model) else {MOST_ROWS: None}
        """The same for rows that may follow one another: of one size, as all up to MOST_ROWS cost about the same."""
        self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def warm_up(self, proposing: bool) -> None:
        """Capture all graphs."""
        for bucket in reversed(self._buckets):  # the largest first: the others fit into its memory
            self._graph(bucket)
        if proposing:
            self._graph(MOST_ROWS, proposing=True)

    @torch.inference_mode()
    def keep(self, sequences: list[Sequence], token_ids: Tensor | None = None) -> None:
        """The next tokens of the sequences, int64 [N] on the card or known: what they decode next."""
        if token_ids is None:
            token_ids = to_device([sequence.token_ids[-1] for sequence in sequences], torch.long, self.device)
        seats = to_device([sequence.seat for sequence in sequences], torch.long, self.device)
        self._last_tokens.index_copy_(0, seats, token_ids)

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Computed:
        """Compute the chunks -> float32 logits [choices of all chunks, V], in order; scores.

        The logits are overwritten by the next call.
        """
        self._write_pages(chunks)
        decoding = [chunk for chunk in chunks if not chunk.sequence.prefilling]  # the scheduler has them first
        if any(chunk.proposed.tokens for chunk in chunks):
            return Computed(self._decode_proposed(chunks), {})
        if len(decoding) == len(chunks):
            return Computed(self._decode(chunks), {})
        return self._mixed(decoding, chunks[len(decoding) :])

    def _write_pages(self, chunks: list[Chunk]) -> None:
        """Tell the card the pages that the sequences were given since the last pass."""
        places: list[int] = []
        pages: list[int] = []
        sequences = [chunk.sequence for chunk in chunks]
        for sequence in sequences:
            written, count = self._written[sequence.seat]
            first = count if written is sequence.pages else 0
            row = sequence.seat * self._page_table.shape[1]
            places += range(row + first, row + len(sequence.pages))
            pages += sequence.pages[first:]
        if pages:
            where, values = to_device([places, pages], torch.long, self.device)
            self._page_table.view(-1).index_copy_(0, where, values.int())
        for sequence in sequences:
            self._written[sequence.seat] = sequence.pages, len(sequence.pages)

    def _decode(self, chunks: list[Chunk]) -> Tensor:
        """One token of each sequence -> logits [N, V]."""
        bucket = next(each for each in self._buckets if each >= len(chunks))
        padding = bucket - len(chunks)
        seats = [chunk.sequence.seat for chunk in chunks] + [len(self._page_table) - 1] * padding
        positions = [chunk.sequence.computed for chunk in chunks] + [0] * padding
        self._decode_rows(to_device([seats, positions], torch.int32, self.device), self._graph(bucket))
        return self._logits[: len(chunks)]

    def _decode_proposed(self, chunks: list[Chunk]) -> Tensor:
        """One known token of each sequence and those that are proposed to follow -> logits [N, V]."""
        seats: list[int] = []
        positions: list[int] = []
        token_ids: list[int] = []
        for sequence, _, (tokens, _) in chunks:
            seats += [sequence.seat] * (1 + len(tokens))
            positions += range(sequence.computed, sequence.computed + 1 + len(tokens))
            token_ids += [sequence.token_ids[sequence.computed], *tokens]
        rows = len(seats)
        padding = [0] * (MOST_ROWS - rows)
        seats += [len(self._page_table) - 1] * len(padding)
        inputs = to_device([seats, positions + padding, token_ids + padding], torch.int32, self.device)
        self._decode_rows(inputs, self._graph(MOST_ROWS, proposing=True))
        return self._logits[:rows]

    def _decode_rows(self, inputs: Tensor, captured: DecodeGraph | None) -> None:
        if captured is None:
            self._decode_pass(inputs)
        else:
            captured.inputs.copy_(inputs)
            captured.graph.replay()

    def _decode_pass(self, inputs: Tensor) -> None:
        """From seats, positions and, with proposals, tokens, int32 [2 or 3, N], to the first N rows of the logits."""
        seats, positions, *known = inputs
        layout = Layout(self._page_table, seats, positions, decoding=len(seats), successive=bool(known))
        token_ids = known[0].long() if known else self._last_tokens[seats]
        hidden = self.model(self.model.embed(token_ids), positions, self._attend(layout))
        self._logits[: len(seats)] = self.model.logits(hidden)

    def _attend(self, layout: Layout) -> AttendOnCard:
        return AttendOnCard(self.model.config.text, self.kv_cache, layout)

    def _graph(self, bucket: int, proposing: bool = False) -> DecodeGraph | None:
        """The pass for so many rows, captured; None where that fails, and then for all others as well."""
        graphs = self._proposing if proposing else self._graphs
        if bucket not in graphs:
            stream = torch.cuda.current_stream()
            try:
                graphs[bucket] = self._capture(bucket, proposing)
            except Exception as error:  # noqa: BLE001  a driver, memory: passes run without it
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own
                self._graphs = {**dict.fromkeys(self._buckets), **self._graphs}
                self._proposing.setdefault(MOST_ROWS, None)
                logger.warning("No CUDA graph for %d rows, so decoding is slower: %s", bucket, error)
                return None
        return graphs[bucket]

    @cached_property
    def _capturing(self) -> torch.cuda.Stream:
        """One for all graphs: cuBLAS keeps a workspace, of 32 MiB on a Hopper card, for each stream that it has met."""
        return torch.cuda.Stream(self.device)

    def _capture(self, bucket: int, proposing: bool) -> DecodeGraph:
        padding = len(self._page_table) - 1
        zeros = [[0] * bucket] * (2 if proposing else 1)
        inputs = to_device([[padding] * bucket, *zeros], torch.int32, self.device)
        graph = torch.cuda.CUDAGraph()
        self._capturing.wait_stream(torch.cuda.current_stream())  # which fills what the passes read
        with torch.cuda.stream(self._capturing):
            for _ in range(WARMING_PASSES):
                self._decode_pass(inputs)
        torch.cuda.current_stream().wait_stream(self._capturing)
        with torch.cuda.graph(graph, self._pool, self._capturing, capture_error_mode="thread_local"):
            self._decode_pass(inputs)
        return DecodeGraph(inputs, graph)

    def _mixed(self, decoding: list[Chunk], prefilling: list[Chunk]) -> Computed:
        """Prompts, or parts of them, beside sequences that decode, in one pass."""
        chunks = [*decoding, *prefilling]
        seats = [chunk.sequence.seat for chunk in chunks for _ in range(chunk.tokens)]
        positions = [at for c in chunks for at in range(c.sequence.computed, c.sequence.computed + c.tokens)]
        rows, places = to_device([seats, positions], torch.int32, self.device)
        layout = Layout(
            self._page_table,
            rows,
            places,
            decoding=len(decoding),
            prefill_rows=to_device([chunk.sequence.seat for chunk in prefilling], torch.int32, self.device),
            before=to_device([chunk.sequence.computed for chunk in prefilling], torch.int32, self.device),
            starts=to_device([0, *ends_of(prefilling)], torch.int32, self.device),
        )
        hidden = self.model(self._embed_all(rows, decoding, prefilling), places, self._attend(layout))
        wanted = [end - 1 for end, chunk in zip(ends_of(chunks), chunks, strict=True) if chunk.completes]
        logits = self.model.logits(hidden[to_device(wanted, torch.long, self.device)])
        return Computed(logits, self._scores(chunks, hidden))

    def _embed_all(self, seats: Tensor, decoding: list[Chunk], prefilling: list[Chunk]) -> Tensor:
        """Embedded tokens [N, C]: those chosen last of who decodes, then those of prompts, with their images."""
        ids = [
            token_id
            for chunk in prefilling
            for token_id in chunk.sequence.token_ids[chunk.sequence.computed :][: chunk.tokens]
        ]
        token_ids = torch.cat([self._last_tokens[seats[: len(decoding)]], to_device(ids, torch.long, self.device)])
        places: list[int] = []
        start = len(decoding)
        for chunk in prefilling:
            places += [start + place for place in self._image_places(chunk)]
            start += chunk.tokens
        if not places:
            return self.model.embed(token_ids)
        features = self._features(prefilling)
        return self.model.embed(token_ids, features, to_device(places, torch.long, self.device))


def _is_short(model: LanguageModel) -> bool:
    """Whether decoding is a few hundred launches, which fit into a graph; the reference kernel makes a million."""
    layers = [*model.language_model.modules(), model.lm_head]
    return not any(isinstance(each, KernelLinear) and isinstance(each.kernel, ReferenceKernel) for each in layers)
