"""Widths for a wanted number of parameters."""

from collections.abc import Callable

TOLERANCE = 0.01


def round_width(count: Callable[[int], int], parameters: int) -> int:
    """The roundest width whose count is within 1 % of the parameters, or failing that the nearest width of all.

    Args:
        count: parameters at a width; grows with it.
        parameters: wanted.

    Returns:
        At least 1. Roundest is divisible by the highest power of two, up to 256.
    """
    low, high = 1, 2
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    near = low
    for power in range(8, -1, -1):
        unit = 1 << power
        below = low // unit * unit
        near = min((w for w in (below, below + unit) if w), key=lambda w: abs(count(w) - parameters))
        if abs(count(near) / parameters - 1) <= TOLERANCE:
            break
    return near
