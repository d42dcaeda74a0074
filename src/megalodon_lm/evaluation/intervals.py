"""Intervals of fractions."""

import math

NORMAL = 1.959963984540054  # quantile of the normal distribution that leaves 2.5 % above it


def wilson(right: int, answers: int) -> tuple[float, float]:
    """95 % interval of a fraction, by Wilson's score: all probabilities from which what was seen is no surprise.

    Those are the p with |right / answers - p| <= z sqrt(p (1 - p) / answers). It stays within 0 and 1, and where all
    answers are right or wrong it has a width, which that of the binomial error has not.

    Args:
        right: of the answers.
        answers: taken for independent; at least 1.
    """
    assert 0 <= right <= answers
    share, spread = right / answers, NORMAL**2 / answers
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return (0.0 if right == 0 else middle - half, 1.0 if right == answers else middle + half)
