"""Chunks of sequences in, logits out: flattens them into one forward pass. Knows no scheduling and chooses no token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from pixtral_cli.engine import sampler
from pixtral_cli.engine.request import ImageInput, TokenScores
from pixtral_cli.engine.scheduler import Chunk
from pixtral_cli.engine.sequence import Sequence
from pixtral_cli.model.attention import AttendPaged, Span
from pixtral_cli.model.kv_cache import KVCache
from pixtral_cli.model.language_model import LanguageModel
from pixtral_cli.model.pass_sizes import SCORED
from pixtral_cli.model.pass_threads import PassThreads

EXACT_ROWS = 8  # as many rows as a float32 matrix product takes for the price of one


class Computed(NamedTuple):
    """Float32 logits [N, V], and the scores that chunks give to the tokens of their prompts, by sequence id."""

    logits: Tensor
    scores: dict[int, TokenScores]


def rounded_rows(rows: int) -> int:
    """A few sizes for all passes: oneDNN and torch keep something like a megabyte for every size they have seen."""
    step = 1 if rows <= 16 else 16 if rows <= 128 else 64
    return -(-rows // step) * step


class ImageFeatures:
    """Features [rows * columns, C] by the image's key and a salt; beyond `limit` bytes those unused for longest go.

    One that is larger than the limit is kept until the next comes: a prompt computed in chunks needs it again.
    """

    def __init__(self, model: LanguageModel, limit: int) -> None:
        self.model = model
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def of(self, images: list[tuple[ImageInput, bytes]]) -> list[Tensor]:
        """The features of each image with its salt; those that are not kept are computed together."""
        keys = [image.key + salt for image, salt in images]
        missing = {key: image for key, (image, _) in zip(keys, images, strict=True) if key not in self._kept}
        pixels = [image.pixels() for image in missing.values()]
        found = dict(zip(missing, self.model.encode_images(pixels), strict=True)) if missing else {}
        for key in dict.fromkeys(keys):
            if key not in missing:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
        for key in missing:
            self._keep(key, found[key])
        return [found[key] for key in keys]

    def _keep(self, key: bytes, features: Tensor) -> None:
        while self._kept and self.nbytes + features.nbytes > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes
        self._kept[key] = features
        self.nbytes += features.nbytes


class Runner:
    """Computes chunks in one pass; with `exact`, in passes whose shapes do not depend on who else is there.

    A token that is proposed to follow a chunk is computed as one that is decoded: with numbers of the same shapes.

    A matrix product's last bits depend on its number of rows. So each chunk of a prompt is then computed by itself,
    and tokens that are decoded in passes of EXACT_ROWS rows, empty ones among them.
    """

    steps_ahead = 0
    """How many steps may be launched before one is read."""

    def __init__(self, model: LanguageModel, kv_cache: KVCache, features: ImageFeatures, exact: bool) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.features = features
        self.device = model.device
        self.exact = exact
        self.threads = PassThreads(exact)

    def warm_up(self, proposing: bool) -> None:
        """Prepare passes, also with proposals. Nothing is prepared here: each runs as it is."""

    def keep(self, sequences: list[Sequence], token_ids: Tensor | None = None) -> None:
        """The next tokens of the sequences, int64 [N] on the device; None if they are known. Here all are, when they
        are computed."""

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> Computed:
        """Compute the chunks -> float32 logits [choices of all chunks, vocab_size], in order; scores."""
        if not self.exact:
            logits, scores = self._pass(chunks, rounded_rows(sum(chunk.rows for chunk in chunks)))
            return Computed(logits[: sum(chunk.choices for chunk in chunks)], scores)
        decoding = [chunk for chunk in chunks if chunk.sequence.answering]
        each = len(decoding) if any(chunk.proposed.tokens for chunk in decoding) else EXACT_ROWS
        groups = [decoding[at : at + each] for at in range(0, len(decoding), each)]
        answers = [self._pass(group, EXACT_ROWS).logits[_completing(group)] for group in groups]
        prompts = [self._pass([chunk]) for chunk in chunks if not chunk.sequence.answering]
        scores = {request_id: each for prompt in prompts for request_id, each in prompt.scores.items()}
        return Computed(torch.cat(answers + [prompt.logits for prompt in prompts]), scores)

    def _pass(self, chunks: list[Chunk], rows: int = 0) -> Computed:
        """One forward pass, padded to `rows` tokens; the logits of padding come last."""
        x = torch.cat([self._embed(chunk) for chunk in chunks])
        spans = [span for chunk in chunks for span in _spans(chunk)]
        positions = torch.cat(
            [torch.arange(span.before, span.before + span.tokens, device=self.device) for span in spans]
        )
        ends = zip(ends_of(chunks), chunks, strict=True)
        wanted = [row for end, chunk in ends for row in range(end - (chunk.choices or (self.exact and rows > 0)), end)]
        if len(x) < rows:
            wanted += range(len(x), rows)
            positions = torch.cat([positions, positions.new_zeros(rows - len(x))])
            x = torch.cat([x, x.new_zeros(rows - len(x), x.shape[1])])
        text = self.model.config.text
        with self.threads.chosen(len(x), self.model.multiplications_per_token):
            hidden = self.model(x, positions, AttendPaged(text, self.kv_cache, spans, self.device))
            logits = self.model.logits(hidden[wanted])
        return Computed(logits, self._scores(chunks, hidden))

    def _scores(self, chunks: list[Chunk], hidden: Tensor) -> dict[int, TokenScores]:
        """The scores that the chunks, whose hidden states [N, C] come first, give to the tokens of their prompts."""
        return {
            chunk.sequence.id: self._scores_of(chunk, hidden[end - chunk.rows : end])
            for end, chunk in zip(ends_of(chunks), chunks, strict=True)
            if chunk.sequence.unscored(chunk.tokens)
        }

    def _scores_of(self, chunk: Chunk, hidden: Tensor) -> TokenScores:
        """Of the prompt's tokens that come after those of `hidden` [tokens of the chunk, C]."""
        sequence = chunk.sequence
        places, alternatives = sequence.unscored(chunk.tokens), sequence.request.prompt_logprobs or 0
        blocks = []
        for start in range(places.start, places.stop, SCORED):
            end = min(start + SCORED, places.stop)
            following = torch.tensor(sequence.token_ids[start + 1 : end + 1], device=hidden.device)
            logits = self._few_logits(hidden[start - sequence.computed : end - sequence.computed])
            blocks.append(sampler.score(logits, following, alternatives))
        return TokenScores(*(torch.cat(parts).cpu() for parts in zip(*blocks, strict=True)))

    def _few_logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden [N, C], computed in one of a few sizes."""
        padding = hidden.new_zeros(rounded_rows(len(hidden)) - len(hidden), hidden.shape[1])
        return self.model.logits(torch.cat([hidden, padding]))[: len(hidden)]

    def _embed(self, chunk: Chunk) -> Tensor:
        sequence, start, device = chunk.sequence, chunk.sequence.computed, self.device
        known = sequence.token_ids[start : start + chunk.tokens]
        ids = torch.tensor([*known, *chunk.proposed.tokens], device=device)
        places = self._image_places(chunk)
        if not places:
            return self.model.embed(ids)
        return self.model.embed(ids, self._features([chunk]), torch.tensor(places, device=device))

    def _image_places(self, chunk: Chunk) -> list[int]:
        """Which tokens of the chunk stand for images: only a prompt's own. One that was generated is like others."""
        sequence, start = chunk.sequence, chunk.sequence.computed
        if not sequence.request.images:
            return []
        prompt = sequence.token_ids[start : min(start + chunk.tokens, sequence.prompt_length)]
        return [place for place, token_id in enumerate(prompt) if token_id == self.model.config.image_token_id]

    def _features(self, chunks: list[Chunk]) -> Tensor:
        """Features [M, C] of the image tokens of all chunks, in order; those of an image are computed whole."""
        shown = [each for chunk in chunks for each in self._shown(chunk)]
        features = self.features.of([(image, salt) for image, salt, _ in shown])
        return torch.cat([each[part] for each, (_, _, part) in zip(features, shown, strict=True)])

    def _shown(self, chunk: Chunk) -> Iterator[tuple[ImageInput, bytes, slice]]:
        """The images that the chunk shows, each with its salt, and which of its features."""
        sequence = chunk.sequence
        image_token = self.model.config.image_token_id
        first = sum(token_id == image_token for token_id in sequence.token_ids[: sequence.computed])
        end, position = first + len(self._image_places(chunk)), 0
        for image in sequence.request.images:
            begin, position = position, position + image.features
            if begin < end and position > first:
                yield image, sequence.request.cache_salt, slice(max(first - begin, 0), end - begin)


def ends_of(chunks: list[Chunk]) -> list[int]:
    """Where the rows of each chunk end, in a pass over all of them."""
    return list(accumulate(chunk.rows for chunk in chunks))


def _spans(chunk: Chunk) -> Iterator[Span]:
    """The chunk's tokens, and each that is proposed by itself."""
    pages, end = chunk.sequence.pages, chunk.sequence.computed + chunk.tokens
    yield Span(pages, end - chunk.tokens, chunk.tokens)
    for n in range(len(chunk.proposed.tokens)):
        yield Span(pages, end + n, 1)


def _completing(group: list[Chunk]) -> list[int]:
    """The rows, in a pass that decodes, after which tokens are to be chosen."""
    return [row for end, chunk in zip(ends_of(group), group, strict=True) for row in range(end - chunk.choices, end)]
