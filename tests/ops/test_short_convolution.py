"""The short convolution against its definition in float64, and against PyTorch's grouped convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.ops import recurrence_definitions
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.short_convolution import shifted_products, short_convolution

from .cases import BOUNDARIES, assert_close, boundaries, gradients

B, D = 3, 5


def case(length, taps=4, dim=D):
    """x, weight, bias, entry state."""
    g = torch.Generator().manual_seed(0)
    shapes = [(B, length, dim), (dim, taps), (dim,), (B, taps - 1, dim)]
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (9, 4), (40, 4), (9, 2)])
def test_equals_definition_with_all_gradients(kind, length, taps):
    where = boundaries(kind, B, length)
    for inputs in (case(length, taps), case(length, taps)[:2]):
        actual = gradients(lambda *a: short_convolution(*a, boundaries=where), inputs)
        expected = gradients(lambda *a: recurrence_definitions.short_convolution(*a, boundaries=where), inputs)
        assert_close(actual[0], expected[0], 1e-14)
        assert_close(actual[1], expected[1], 1e-13)


def test_equals_grouped_convolution():
    x, weight, bias, _ = case(20)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=D).transpose(1, 2)
    assert_close([short_convolution(x, weight, bias)[0]], [expected], 1e-14)


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize(("length", "taps", "dim"), [(1, 4, 16), (3, 4, 16), (70, 4, 48), (70, 2, 16)])
def test_native_equals_definition_with_all_gradients(kind, length, taps, dim):
    where = boundaries(kind, B, length)
    for inputs in (case(length, taps, dim=dim), case(length, taps, dim=dim)[:2]):
        actual = gradients(lambda *a: short_convolution(*a, boundaries=where), [t.float() for t in inputs])
        expected = gradients(lambda *a: recurrence_definitions.short_convolution(*a, boundaries=where), inputs)
        assert_close(actual[0], expected[0], 1e-6)
        assert_close(actual[1], expected[1], 1e-5)
    window = torch.zeros(B, taps - 1 + length, dim)
    assert shifted_products.implementation(window, inputs[1], None, None) is not shifted_products.portable


@pytest.mark.parametrize("dim", [5, 16])
def test_bf16_rounds_once(dim):
    x, weight, bias, state = case(20, dim=dim)
    x, state = x.bfloat16(), state.bfloat16()
    y, leaving = short_convolution(x, weight.float(), bias.float(), state)
    expected, _ = recurrence_definitions.short_convolution(x.double(), weight, bias, state.double())
    assert y.dtype == leaving.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_cut_gives_the_same(data):
    """Outputs, exit state and all gradients."""
    length = data.draw(st.integers(2, 12))
    cut = data.draw(st.integers(1, length - 1))
    where = boundaries(data.draw(st.sampled_from(["none", "documents"])), B, length, data.draw(st.integers(0, 99)))
    parts = [None, None] if where is None else [Boundaries(s) for s in where.starts.split([cut, length - cut], 1)]

    def pieces(x, weight, bias, state):
        first, state = short_convolution(x[:, :cut], weight, bias, state, parts[0])
        second, state = short_convolution(x[:, cut:], weight, bias, state, parts[1])
        return torch.cat([first, second], 1), state

    actual = gradients(pieces, case(length))
    expected = gradients(lambda *a: short_convolution(*a, where), case(length))
    assert_close(actual[0], expected[0], 1e-14)
    assert_close(actual[1], expected[1], 1e-13)


def test_nothing_leaks():
    """No gradient at all, and no NaN, reaches earlier documents, the entry state, later tokens or padding."""
    x, weight, bias, state = (t.requires_grad_() for t in case(12))
    starts = torch.zeros(B, 12, dtype=torch.bool)
    starts[:, 6] = True
    where = Boundaries(starts, torch.tensor([12, 9, 9]))
    y, leaving = short_convolution(x, weight, bias, state, where)
    to_x, to_state = torch.autograd.grad(y[:, 6:8].sum(), (x, state), retain_graph=True)
    assert to_x[:, 6:8].all()
    assert not to_x[:, :6].any()
    assert not to_x[:, 8:].any()
    assert not to_state.any()
    (to_x,) = torch.autograd.grad(y.sum() + leaving.sum(), x)
    assert not to_x[1:, 9:].any()

    spoilt = x.detach().clone()
    spoilt[:, :6] = spoilt[1:, 9:] = torch.nan
    spoilt.requires_grad_()
    y, leaving = short_convolution(spoilt, weight, bias, state, where)
    assert y[:, 6:9].isfinite().all()
    assert leaving.isfinite().all()
