"""Timing contenders in turns: what slows the machine for a while slows them alike, and the ratio stays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

Timer = Callable[[], float]
"""Does the work once and returns the seconds it took."""


@dataclass(frozen=True)
class Ratio:
    """Of two rates over the rounds: the median of the rounds' ratios, and the smallest and largest of them."""

    median: float
    low: float
    high: float


def alternate(timers: Sequence[Timer], rounds: int) -> list[list[float]]:
    """Let each timer run once a round, every other round in reverse order, so that none has always the same before it.

    Args:
        timers: already warmed up.
        rounds: at least 1.

    Returns:
        For each timer its seconds, one a round.
    """
    seconds: list[list[float]] = [[] for _ in timers]
    turns = list(zip(timers, seconds, strict=True))
    for number in range(rounds):
        for timer, times in turns[:: -1 if number % 2 else 1]:
            times.append(timer())
    return seconds


def rounds_within(budget: float, one_round: float, fewest: int, most: int) -> int:
    """How many rounds fit into a budget of seconds, but never fewer or more than allowed."""
    return max(fewest, min(most, int(budget / max(one_round, 1e-9))))


def least(timers: Sequence[Timer], budget: float = 1.0) -> list[float]:
    """The shortest time of each timer, in turns: of as many rounds as fit into a budget of seconds, from two to nine.

    Each runs once before, unmeasured.
    """
    one_round = sum([timer() for timer in timers])
    return list(map(min, alternate(timers, rounds_within(budget, one_round, 2, 9))))


def rate_ratio(ours: Sequence[float], peer: Sequence[float], ours_work: float = 1, peer_work: float = 1) -> Ratio:
    """Our rate over the peer's, round by round.

    Args:
        ours: our seconds in each round.
        peer: the peer's seconds in the same rounds.
        ours_work: what we do in a round, such as tokens.
        peer_work: what the peer does.
    """
    ratios = [(ours_work / a) / (peer_work / b) for a, b in zip(ours, peer, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))
