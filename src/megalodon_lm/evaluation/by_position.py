"""Loss by position in the context, from few windows: every token is compared with itself.

How hard a text is changes from page to page by more than context is worth beyond a few thousand tokens, so that a plain
mean over a few windows jumps. Here windows start in many places of a text that has been read once as a whole, and what
is averaged is by how much each token is harder to predict in its window than it was there.
"""

import math
from dataclasses import dataclass

import numpy as np

OBSERVATION = 64  # neighbouring tokens whose mean counts as one observation


@dataclass(frozen=True)
class Rise:
    """Mean loss above that of the same tokens in the whole text, and its standard error."""

    mean: float
    error: float


def window_starts(length: int, window: int, tokens: int) -> np.ndarray:
    """Places for windows of about so many tokens in all, at least one, evenly spaced up to the end of the text.

    The beginning is left out, where a window and the whole text are the same.
    """
    number = max(1, min(tokens // window, length - window))
    return (np.arange(1, number + 1) * (length - window)) // number


def rise_by_position(rises: list[np.ndarray]) -> dict[int, Rise]:
    """Average by position, in buckets that end at powers of two.

    Args:
        rises: of windows of several lengths, each (windows, length): losses less those in the whole text.

    Returns:
        By the last position of the bucket, counted from 1.
    """
    found: dict[int, Rise] = {}
    longest, low = max((r.shape[1] for r in rises), default=0), 0
    while low < longest:
        high = min(max(1, 2 * low), longest)
        parts = [
            r[:, at : min(at + OBSERVATION, high)]
            for r in rises
            if r.shape[1] >= high
            for at in range(low, high, OBSERVATION)
        ]
        sums = np.concatenate([part.sum(1) for part in parts])
        sizes = np.concatenate([np.full(len(part), part.shape[1]) for part in parts])
        mean = sums.sum() / sizes.sum()
        spread = ((sums - mean * sizes) ** 2).sum() * len(sums) / max(1, len(sums) - 1)
        found[high] = Rise(float(mean), math.sqrt(spread) / float(sizes.sum()))
        low = high
    return found
