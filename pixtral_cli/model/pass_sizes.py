"""The most that is computed in one pass: `memory` plans for it, the engine and the tower keep to it. Knows no model."""

from __future__ import annotations

PREFILL = 8192
"""Tokens of prompts in one pass on a GPU: an image's and its question's, and enough for full speed."""
PATCHES = 16384
"""Patches of images in one pass of the tower on a GPU, unless one image has more. Fewer leave a large GPU idle."""
SCORED = 64
"""Tokens of prompts whose logits are held at one time, where their log-probabilities are asked for: 32 MiB of float32
for a vocabulary of 131,072."""
GRAPH_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
"""Sequences that a captured graph decodes. A step of fewer is padded, which costs little: it reads the same weights."""
IMAGE_CACHE = 512 * 2**20
"""Bytes of images' features that are kept, unless another number is asked for."""
