"""How CEMA's kernels hold states and coefficients in scratch: real parts beside imaginary ones, by sixteen channels."""

from typing import Any

from .simd import inner, load, store
from .strips import CHANNELS

STEP = 2 * CHANNELS  # of one state of a task
COEFFICIENTS = 5 * CHANNELS  # of one state of a task: q real, q imaginary, p, g real, g imaginary


@inner
def load_pair(states: Any, at: int) -> Any:
    """Real and imaginary part of sixteen channels of one state."""
    return load(states, at), load(states, at + CHANNELS)


@inner
def store_pair(states: Any, at: int, h: Any) -> None:
    """The inverse of load_pair."""
    store(states, at, h[0])
    store(states, at + CHANNELS, h[1])


@inner
def load_coefficients(table: Any, at: int) -> Any:
    """q real, q imaginary, p, g real, g imaginary of sixteen channels of one state."""
    qr, qi, p = load(table, at), load(table, at + CHANNELS), load(table, at + 2 * CHANNELS)
    return qr, qi, p, load(table, at + 3 * CHANNELS), load(table, at + 4 * CHANNELS)
