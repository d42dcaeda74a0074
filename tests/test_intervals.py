"""Intervals of fractions, against their definition in exact arithmetic and against what they promise."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.evaluation.intervals import NORMAL, wilson


@settings(deadline=None)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_are_where_the_deviation_is_exactly_the_quantile(counts):
    """(x/n - p)^2 = z^2 p (1 - p) / n has one root on each side of x/n: its sign changes there, in exact fractions."""
    right, answers = counts
    share, square = Fraction(right, answers), Fraction(NORMAL) ** 2

    def outside(p):
        return (share - p) ** 2 - square * p * (1 - p) / answers > 0

    low, high = map(Fraction, wilson(right, answers))
    step = Fraction(1, 10**12)
    assert 0 <= low <= share <= high <= 1
    assert low == 0 if right == 0 else outside(low - step) and not outside(low + step)
    assert high == 1 if right == answers else outside(high + step) and not outside(high - step)


def test_known_values():
    assert wilson(0, 10) == pytest.approx((0, 0.2775328), abs=1e-7)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1), abs=1e-7)
    assert wilson(15, 50) == pytest.approx((0.1910, 0.4375), abs=5e-5)
    low, high = wilson(2048, 2048)
    assert high == 1
    assert 1 - low == pytest.approx(NORMAL**2 / (2048 + NORMAL**2))


@pytest.mark.parametrize("answers", [20, 64, 256])
def test_it_holds_the_truth_as_often_as_it_says(answers):
    """Exact binomial sums: over all probabilities 95 % on the average, and never far below; near 0 and 1 too."""
    inside = [wilson(right, answers) for right in range(answers + 1)]
    covered = []
    for number in range(1, 400):
        p = number / 400
        covered.append(
            sum(
                math.comb(answers, right) * p**right * (1 - p) ** (answers - right)
                for right, (low, high) in enumerate(inside)
                if low <= p <= high
            )
        )
    assert 0.94 < sum(covered) / len(covered) < 0.965
    assert min(covered) > 0.83
