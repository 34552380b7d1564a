"""How Triton's kernels follow each other without a pause. Import it after `triton_support.available`.

`chained` kernels begin while the kernel before them still runs, and wait for it only before they read what it wrote
(programmatic dependent launch, compute capability 9 and up: `triton_support.chains`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begin(chained: tl.constexpr):
    """Let the next kernel be put onto the card, and wait until all that the kernel before wrote can be read."""
    if chained:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
