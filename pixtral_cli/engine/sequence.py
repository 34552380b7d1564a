"""A request under way: its tokens, what of them is computed, its pages. Knows no scheduling."""

from __future__ import annotations

import torch

from pixtral_cli.engine.pages import PageKeys
from pixtral_cli.engine.request import FinishReason, Request, TokenScores
from pixtral_cli.engine.sampler import Row
from pixtral_cli.model.kv_cache import PAGE

UNREAD = -1
"""Stands for a token that was chosen on a card, until it is read."""


class Sequence:
    """`token_ids` is the prompt and all that came after it; the first `computed` of them have keys and values.

    The last `unread` tokens are chosen, and not known here yet: the device has them. It ends after `max_tokens` new
    tokens at the latest. The first `scored` tokens of the prompt need no more scores. While it runs, `seat` is
    a number below the most that run, which no other has. Its draws are made on `device`.
    """

    def __init__(
        self,
        request_id: int,
        request: Request,
        max_tokens: int,
        image_token_id: int | None,
        device: torch.device | None = None,
    ) -> None:
        self.id = request_id
        self.request = request
        self.max_tokens = max_tokens
        self.prompt_length = len(request.token_ids)
        self.token_ids = list(request.token_ids)
        self.page_keys = PageKeys(request, image_token_id)
        self.page_keys.extend(self.token_ids, (self.prompt_length - 1) // PAGE)  # one token is always left to compute
        self.pages: list[int] = []
        self.seat = 0
        self.removed = False
        self.computed = 0
        self.unread = 0
        self.named = 0  # pages at its beginning that were told by `filled_pages`
        self.cached_tokens = 0
        self.proposed_tokens = 0  # of the answer: computed before it was known that they come
        self.accepted_tokens = 0  # that came
        self.scored = self.prompt_length if request.prompt_logprobs is None else 1  # nothing comes before the first
        self.scores: list[TokenScores] = []
        self.prefilling = True
        self.waits_since = 0  # while it prefills: the step after its last chunk, or that in which it entered
        random = torch.Generator(device or "cpu")
        if request.sampling.seed is None:
            random.seed()
        else:
            random.manual_seed(request.sampling.seed)
        self.row = Row(
            request.sampling, self.token_ids, self.prompt_length, random, request.constraint, request.logprobs
        )

    @property
    def known(self) -> int:
        """Tokens whose ids are known here."""
        return len(self.token_ids) - self.unread

    @property
    def pending(self) -> int:
        """Tokens still to be computed: the rest of the prompt, or the one that was chosen last."""
        return len(self.token_ids) - self.computed

    @property
    def answering(self) -> bool:
        """Whether its next token to compute is one that was generated."""
        return self.computed >= self.prompt_length

    @property
    def shareable(self) -> int:
        """Tokens that can come from known pages. The one before a token to score, or to choose, has to be computed."""
        return self.scored - 1 if self.scored < self.prompt_length else len(self.token_ids) - 1

    def unscored(self, tokens: int) -> range:
        """Of the next `tokens` pending tokens, the places of those whose logits score the prompt's token after them."""
        end = min(self.computed + tokens, self.prompt_length - 1)
        return range(max(self.computed, self.scored - 1), end)

    @property
    def generated(self) -> int:
        """Tokens of the answer that are known here."""
        return self.known - self.prompt_length

    @property
    def unchosen(self) -> int:
        """Tokens that may still be chosen."""
        return self.max_tokens - (len(self.token_ids) - self.prompt_length)

    @property
    def all_chosen(self) -> bool:
        """Whether no token is to be chosen any more, though the last ones may be unread."""
        return self.unchosen <= 0

    def begin(self, seat: int, known_pages: list[int]) -> None:
        """It runs, in `seat`; the first pages of it are computed."""
        self.seat, self.pages = seat, known_pages
        self.computed, self.named = len(known_pages) * PAGE, len(known_pages)

    def advance(self, tokens: int) -> None:
        """So many more are computed, or will be before anything that comes after."""
        self.computed += tokens
        self.prefilling = self.pending > 0

    def filled_pages(self) -> range:
        """The places of the pages filled with known tokens since this was asked last; they have keys now."""
        first, self.named = self.named, min(self.computed, self.known) // PAGE
        self.page_keys.extend(self.token_ids, self.named)
        return range(first, self.named)

    def choose(self) -> None:
        """Its next token is chosen on the device."""
        self.token_ids.append(UNREAD)
        self.unread += 1

    def read(self, token_id: int) -> None:
        """The first token that was unread."""
        self.token_ids[self.known] = token_id
        self.unread -= 1

    def score(self, scores: TokenScores) -> None:
        """Take the scores of the prompt's next tokens; they are kept when it restarts."""
        self.scores.append(scores)
        self.scored += len(scores.logprobs)

    def restart(self) -> None:
        """It has lost its pages: everything is to be computed again."""
        self.pages, self.computed, self.named, self.prefilling = [], 0, 0, True

    @property
    def finish_reason(self) -> FinishReason | None:
        if self.generated and self.token_ids[self.known - 1] in self.request.end_token_ids:
            return "stop"
        return "length" if self.generated >= self.max_tokens else None
