"""Looking whether an op's output is finite, at the few rows that tell of all, without gathering them."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from .simd import as_numpy, compiled

EXPONENTS = {2: (0x7F80_7F80_7F80_7F80, 0x0080_0080_0080_0080), 4: (0x7F80_0000_7F80_0000, 0x0080_0000_0080_0000)}
"""By bytes of an element: the bits that are all set in NaN and infinity, and their lowest; four or two elements."""


def is_finite(out: Tensor, since: Tensor) -> bool:
    """As megalodon_lm.ops.finite.is_finite, for contiguous float32 or bf16, outside of graphs; no sum can overflow."""
    size, width = out.element_size(), math.prod(out.shape[2:])
    word = 8 if width * size % 8 == 0 else size  # so many bytes are looked at in one
    words = as_numpy(out).view(f"u{size}").reshape(*out.shape[:2], width).view(f"u{word}")
    exponents, lowest = (np.uint64(bits).astype(words.dtype) for bits in EXPONENTS[size])
    return bool(all_finite(words, exponents, lowest, as_numpy(since)))


@compiled
def all_finite(words: Any, exponents: Any, lowest: Any, since: Any) -> bool:
    """Rows of words (B, L, n), those that tell: at padding and within a run of `since` (B, L) none is looked at."""
    batch, length = since.shape
    for b in range(batch):
        for t in range(length):
            if since[b, t] < 0 or (t + 1 < length and since[b, t + 1] == since[b, t] + 1):
                continue
            carried = np.uint64(0)
            for word in words[b, t]:
                carried |= (word & exponents) + lowest  # an exponent of ones carries into the sign
            if carried & (lowest << 8):
                return False
    return True
