"""Requests of random words and pictures, for the models of `builders`."""

import hashlib

import torch

from pixtral_cli.engine.request import ImageInput, Request

IMAGE, BREAK = 10, 12
"""Tokens: a patch of a picture, the end of a row of them."""


def words(seed, length):
    """Token ids, no special ones among them."""
    return torch.randint(14, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def picture(seed, rows=4, columns=5):
    """A picture's token ids, and what the engine takes for it."""
    pixels = torch.randn(3, rows * 16, columns * 16, generator=torch.Generator().manual_seed(seed))
    ids = ([IMAGE] * columns + [BREAK]) * rows
    return ids, ImageInput(hashlib.sha256(pixels.numpy().tobytes()).digest(), rows * columns, lambda: pixels)


def asked(*parts, tokens=12, **fields):
    """A request of texts (lists of ids) and pictures (of `picture`), in order."""
    ids, pictures = [], []
    for part in parts:
        ids += part if isinstance(part, list) else part[0]
        pictures += [] if isinstance(part, list) else [part[1]]
    return Request(tuple(ids), tokens, images=tuple(pictures), **fields)
