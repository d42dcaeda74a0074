import pytest
import torch

from megalodon_lm.ops import reference
from megalodon_lm.ops import timestep_norm as portable
from megalodon_lm.ops.timestep_norm import NormState

from .cases import BOUNDARIES, assert_close, boundaries, gradients

timestep_norm = portable.timestep_norm.portable

B, D, G = 3, 12, 3


def case(length, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(s, generator=g, dtype=dtype) for s in ((B, length, D), (D,), (D,)))
    mean = torch.randn(B, G, generator=g, dtype=torch.float64)
    var = torch.rand(B, G, generator=g, dtype=torch.float64) + 0.1
    return [x, w, b, mean, var]


def run(op, where, count=(5, 0, 100)):
    def call(x, w, b, mean, var):
        y, state = op(x, w, b, G, 1e-5, NormState(torch.tensor(count), mean, var), where)
        return y, state.mean, state.var

    return call


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize("length", [1, 7, 64, 150])
def test_equals_reference_with_all_gradients(kind, length):
    where = boundaries(kind, B, length)
    inputs = case(length)
    inputs[3][1], inputs[4][1] = 0, 0  # the row that has seen nothing
    actual = gradients(run(timestep_norm, where), inputs)
    expected = gradients(run(reference.timestep_norm, where), inputs)
    assert_close(actual[0], expected[0], 1e-11)
    if length == 1:  # d var / d x of a single scalar group is exactly zero in one form and rounding in the other
        assert_close(actual[1][1:], expected[1][1:], 1e-10)
    else:
        assert_close(actual[1], expected[1], 1e-10)


@pytest.mark.parametrize("kind", BOUNDARIES)
def test_counts_tokens(kind):
    where = boundaries(kind, B, 20)
    x, w, b, mean, var = case(20)
    entry = NormState(torch.tensor([5, 0, 100]), mean, var)
    counts = [op(x, w, b, G, 1e-5, entry, where)[1].count for op in (timestep_norm, reference.timestep_norm)]
    assert torch.equal(*counts)
    assert counts[0].dtype == torch.int64


def test_gradcheck():
    inputs = [t.requires_grad_() for t in case(9)]
    assert torch.autograd.gradcheck(run(timestep_norm, boundaries("both", B, 9)), inputs)


def test_white_noise_has_unit_rms():
    """The variance within a token belongs to the statistics: without it the output is several times too large."""
    x = torch.randn(8, 1000, 64, generator=torch.Generator().manual_seed(0))
    y, _ = timestep_norm(x, torch.zeros(64), torch.zeros(64), 4)
    rms = y[:, 100:].square().mean().sqrt()
    assert abs(rms - 1) < 0.01


def test_statistics_are_moments_of_all_scalars_so_far():
    x = case(50)[0]
    _, state = timestep_norm(x, torch.zeros(D), torch.zeros(D), G)
    for t in (1, 17, 50):
        _, state = timestep_norm(x[:, :t], torch.zeros(D), torch.zeros(D), G)
        scalars = x[:, :t].reshape(B, t, G, -1).transpose(1, 2).flatten(2)
        torch.testing.assert_close(state.mean, scalars.mean(-1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state.var, scalars.var(-1, unbiased=False), rtol=1e-12, atol=1e-12)


def test_does_not_drift_over_ten_million_tokens():
    """Mean 1000, std 1, float32 in pieces of 100,000, against one float64 sum over everything."""
    generator = torch.Generator().manual_seed(0)
    weight = bias = torch.zeros(4)
    state, total, squares = None, torch.zeros(2).double(), torch.zeros(2).double()
    for _ in range(100):
        x = 1000 + torch.randn(1, 100_000, 4, generator=generator)
        y, state = timestep_norm(x, weight, bias, 2, state=state)
        groups = x.double().view(-1, 2, 2).transpose(0, 1).flatten(1) - 1000
        total, squares = total + groups.sum(1), squares + groups.square().sum(1)
    count = 2 * 10_000_000
    mean = total / count
    var = squares / count - mean.square()
    assert state.count.item() == 10_000_000
    assert (state.mean[0] - 1000 - mean).abs().max() < 1e-3
    assert (state.var[0] - var).abs().max() < 1e-3
    last = ((x[0, -1].double().view(2, 2) - 1000 - mean[:, None]) / (var[:, None] + 1e-5).sqrt()).flatten()
    assert (y[0, -1].double() - last).abs().max() < 1e-3
