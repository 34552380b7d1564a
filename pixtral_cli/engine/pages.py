"""Which page of the KV cache belongs to whom, and which still holds what somebody may ask again. Knows no tensors.

A page that is full and computed is known by its `key`, which stands for all tokens from the start of the prompt to its
end. When nobody uses it any more it stays, until room is needed: then the page unused for longest goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice

from pixtral_cli.engine.request import Request
from pixtral_cli.model.kv_cache import PAGE

SLACK = 16  # pages kept free behind a sequence while there is room, so that it can grow in one piece
ROOMINESS = 1.5
"""New pages are looked for among the first ones, of this many times as many as are needed. With more, sequences lie in
one piece more often; but more pages are written, and a page that was written once takes memory for good."""


class PageTable:
    """`count` pages: free, in use by one or several sequences, or unused but known, of these at most `most_unused`."""

    def __init__(self, count: int, most_unused: int | None = None) -> None:
        self.count = count
        self.most_unused = count if most_unused is None else most_unused
        self._free = [True] * count
        self._free_count = count
        self._users: dict[int, int] = {}
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # known ones, the longest unused first

    @property
    def available(self) -> int:
        """Pages that can be had."""
        return self._free_count + len(self._unused)

    @property
    def in_use(self) -> int:
        return len(self._users)

    def take(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` pages, following page `after` and each other where possible; None if there are not so many."""
        if count > self.available:
            return None
        taken: list[int] = []
        page = self.count if after is None else after + 1
        for left in range(count, 0, -1):
            if page >= self.count or not self._free[page]:
                page = self._start_of_run(left)
            if self._free[page]:
                self._free[page] = False
                self._free_count -= 1
            else:
                self._forget(page)
            self._users[page] = 1
            taken.append(page)
            page += 1
        return taken

    def _start_of_run(self, wanted: int) -> int:
        """Where so many free pages lie together, SLACK behind them and behind the sequence before them, else in the
        longest run, else the oldest unused page. The first such place: what was never written takes no memory."""
        if not self._free_count:
            return next(iter(self._unused))
        best, longest, run, slack = 0, 0, 0, 0
        reach = int((self.count - self._free_count + wanted) * ROOMINESS) + SLACK
        for page, free in enumerate(islice(self._free, reach)):
            run = run + 1 if free else 0
            if run == 1:
                slack = SLACK if page - 1 in self._users else 0
            if run - slack > longest:
                best, longest = page - run + 1 + slack, run - slack
                if longest == wanted + SLACK:
                    break
        return best if longest else self._free.index(True)

    def _forget(self, page: int) -> None:
        del self._unused[page]
        del self._by_key[self._key_of.pop(page)]

    def known(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest beginning of `keys` that is known."""
        pages: list[int] = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more sequence uses these known pages."""
        for page in pages:
            self._unused.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1

    def name(self, page: int, key: bytes) -> None:
        """The page, which is in use, is full and computed from now on; of two with one key the first is known."""
        if key not in self._by_key and page not in self._key_of:
            self._by_key[key] = page
            self._key_of[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """A sequence lets go of its pages; the end of what it knew goes before the beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            del self._users[page]
            if page in self._key_of:
                self._unused[page] = None
            else:
                self._set_free(page)
        while len(self._unused) > self.most_unused:
            oldest = next(iter(self._unused))
            self._forget(oldest)
            self._set_free(oldest)

    def _set_free(self, page: int) -> None:
        self._free[page] = True
        self._free_count += 1


class PageKeys:
    """The keys of a sequence's full pages: a chain of SHA-256 over token ids, the images in them, and a salt.

    An image counts by its own key, in every page that has one of its image tokens.
    """

    def __init__(self, request: Request, image_token_id: int | None) -> None:
        self._images = [image.key for image in request.images]
        self._ends = list(accumulate(image.features for image in request.images))
        self._image_token_id = image_token_id
        self._image_tokens = 0  # in the pages that have keys
        self._last = hashlib.sha256(request.cache_salt).digest()
        self.keys: list[bytes] = []

    def extend(self, token_ids: Sequence[int], full_pages: int) -> None:
        """Make keys up to `full_pages` pages."""
        for page in range(len(self.keys), full_pages):
            ids = token_ids[page * PAGE : (page + 1) * PAGE]
            content = hashlib.sha256(self._last + array("q", ids).tobytes())
            for key in self._image_keys(ids):
                content.update(key)
            self._last = content.digest()
            self.keys.append(self._last)

    def _image_keys(self, ids: Sequence[int]) -> list[bytes]:
        here = ids.count(self._image_token_id) if self._images else 0
        if not here:
            return []
        first = bisect_right(self._ends, self._image_tokens)
        self._image_tokens += here
        last = bisect_right(self._ends, self._image_tokens - 1)
        return self._images[first : last + 1]
