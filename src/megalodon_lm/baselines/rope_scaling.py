"""Rotary positions for a window some times longer than the one a transformer was trained with.

- linear (position interpolation, Chen et al. 2023): every frequency is divided by the factor;
- ntk (NTK-aware): the base grows, so that the slowest pair turns as with linear and the fastest as before;
- yarn (Peng et al. 2023): pairs that turn more than 32 times in the trained window stay, those that turn less than once
  are divided, those between are mixed, and scores grow by (0.1 ln(factor) + 1)^2.
"""

import math
from typing import NamedTuple

from ..ops.rotary import Base, frequencies

FAST, SLOW = 32, 1  # turns in the trained window, of yarn


class RopeScaling(NamedTuple):
    """How positions are scaled: the kind, the factor, and the window of the training in tokens."""

    kind: str
    factor: float
    trained: float


def scaled_base(scaling: RopeScaling, dim: int, base: float) -> Base:
    """The base of frequencies for heads of width dim, or the frequencies."""
    kind, factor, trained = scaling
    if kind == "none" or factor == 1:
        return base
    if kind == "ntk":
        return base * factor ** (dim / max(dim - 2, 1))
    steps = frequencies(dim, base).tolist()
    if kind == "linear":
        return tuple(step / factor for step in steps)
    assert kind == "yarn"
    # The pair, as a fraction, that turns so many times; whole pairs bound the ramp between.
    first, last = (dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (FAST, SLOW))
    low, high = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
    mixed = []
    for pair, step in enumerate(steps):
        divided = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
        mixed.append(step * (1 - divided) + step / factor * divided)
    return tuple(mixed)


def attention_factor(scaling: RopeScaling) -> float:
    """What scores are multiplied by."""
    return (0.1 * math.log(scaling.factor) + 1) ** 2 if scaling.kind == "yarn" else 1.0
