"""Sizes for a wanted number of parameters: what every architecture's `sized` asks."""

import math
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

TOLERANCE = 0.01


class Counted(Protocol):
    """A configuration, as far as this file needs to know it."""

    @property
    def num_parameters(self) -> int:
        """Trainable scalars."""


C = TypeVar("C", bound=Counted)


def nearest_size(
    make: Callable[[int, int], C], parameters: int, ratio: float, width_unit: int = 1, inner_unit: int = 1
) -> C:
    """The configuration of so many parameters, to 1 % where that can be, whose proportions are nearest to those wanted.

    Widths alone are too coarse at small sizes, so the inner width is solved for each of them.

    Args:
        make: a configuration of a width of the residual stream and an inner width, such as that of the feed-forward
            network; its parameters grow with both.
        parameters: wanted.
        ratio: of inner width to width, wanted.
        width_unit: widths are multiples of this, besides those of `widths`; a head's width for instance.
        inner_unit: inner widths are multiples of this.
    """
    found: list[tuple[float, float, C]] = []
    for width in widths(width_unit):
        if found and make(width, inner_unit).num_parameters > parameters:
            break
        units = round_width(lambda n, w=width: make(w, n * inner_unit).num_parameters, parameters)  # type: ignore[misc]
        config = make(width, units * inner_unit)
        miss = max(abs(config.num_parameters / parameters - 1), TOLERANCE)
        found.append((miss, abs(math.log(units * inner_unit / (ratio * width))), config))
    return min(found, key=lambda choice: choice[:2])[2]


def usual_depth(parameters: int) -> int:
    """Blocks of a language model of so many parameters: 6 up to 50M, 12 to 200M, 24 to 3B, then 32."""
    return next((depth for most, depth in ((5e7, 6), (2e8, 12), (3e9, 24)) if parameters <= most), 32)


def widths(unit: int = 1) -> Iterator[int]:
    """Widths of a residual stream that divide well, in steps of 6 to 12 %: multiples of 8, of 16 from 128 on, to 64."""
    width = 0
    while True:
        width += math.lcm(unit, 64 if width >= 512 else 32 if width >= 256 else 16 if width >= 128 else 8)
        yield width


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
