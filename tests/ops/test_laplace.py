"""The Laplace function against the normal distribution that it is, in all forms and sizes."""

import math

import pytest
import torch
from torch.distributions import Normal

from megalodon_lm.ops.laplace import laplace

from .cases import assert_close, gradients

COUNTS = torch.tensor([1, 7, 300])


def definition(scores, counts):
    means = scores / counts.view(-1, *(1,) * (scores.dim() - 1))
    mean, variance = torch.tensor([0.5**0.5, 0.25 / math.pi], dtype=torch.float64)
    return Normal(mean, variance.sqrt()).cdf(means)


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 2, 4), (3, 17), (3, 2, 61, 67), (3, 1, 4, 1025)])
def test_it_is_a_normal_distribution_with_its_slope(shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = 3 * COUNTS.view(-1, *(1,) * (len(shape) - 1)) * scores
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        given = [scores.to(dtype)]
        natively = dtype != torch.float64 and math.prod(shape[1:]) >= 16
        assert (laplace.implementation(*given, COUNTS) is not laplace.portable) == natively
        expected = gradients(lambda s: [definition(s, COUNTS)], [given[0].double()])
        actual = gradients(lambda s: [laplace(s, COUNTS)], given)
        assert actual[0][0].dtype == actual[1][0].dtype == dtype
        assert_close(actual[0], expected[0], near)
        assert_close(actual[1], expected[1], near)
    assert laplace(scores.bfloat16(), COUNTS, out_dtype=torch.float32).dtype == torch.float32


def test_far_scores_give_all_or_nothing_and_what_is_no_number_stays_where_it_is():
    scores = torch.zeros(1, 40)
    scores[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -30.0])
    for op in (laplace, laplace.portable):
        found = op(scores, COUNTS[:1])[0]
        assert found[0] == 1
        assert 0 <= found[1] < 1e-30
        assert 0 <= found[3] < 1e-30
        assert found.isnan().nonzero().tolist() == [[2]]
