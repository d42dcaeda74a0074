"""Sizes of baselines: near the wanted number of parameters, and near the wanted proportions."""

from dataclasses import dataclass

import pytest

from megalodon_lm.sizing import nearest_size, round_width, usual_depth, widths


@dataclass(frozen=True)
class Sizes:
    """A transformer over bytes."""

    width: int
    inner: int
    layers: int = 6

    @property
    def num_parameters(self):
        return 2 * 256 * self.width + self.layers * (4 * self.width**2 + 3 * self.width * self.inner + 2 * self.width)


@pytest.mark.parametrize("parameters", [100_000, 250_000, 1_500_000, 5_000_000, 21_700_000, 1_300_000_000])
def test_parameters_to_one_percent_and_proportions_as_wanted(parameters):
    depth = usual_depth(parameters)
    found = nearest_size(lambda width, inner: Sizes(width, inner, depth), parameters, 8 / 3)
    assert 4 * depth <= found.width <= 128 * depth
    assert found.num_parameters == pytest.approx(parameters, rel=0.01)
    assert 0.8 * 8 / 3 <= found.inner / found.width <= 1.25 * 8 / 3


def test_units_are_kept_and_cost_no_accuracy_that_can_be_had():
    found = nearest_size(Sizes, 5_000_000, 2, width_unit=96, inner_unit=32)
    assert (found.width % 96, found.inner % 32) == (0, 0)
    assert found.num_parameters == pytest.approx(5_000_000, rel=0.01)


def test_far_too_few_parameters_give_the_smallest():
    assert nearest_size(Sizes, 1, 8 / 3) == Sizes(8, 1)


def test_widths_of_the_stream_divide_well():
    found = [width for width, _ in zip(widths(), range(40), strict=False)]
    assert found[:17] == [*range(8, 129, 8), 144]
    assert {512, 576, 640} <= set(found)
    assert next(widths(96)) == 96


def test_round_widths():
    assert round_width(lambda w: w * w, 1000**2) == 1000
    assert round_width(lambda w: w * w, 1022**2) == 1024
    assert round_width(lambda w: 10_000 * w, 14_000) == 1
