"""The selective scan, portable and native, against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.ops import recurrence_definitions as definitions
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.selective_scan import selective_scan

from .cases import BOUNDARIES, assert_close, boundaries, gradients

B, D, N = 3, 5, 3


def case(length, dim=D, ndim=N, batch=B, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    a = -torch.exp(draw(dim, ndim))
    tokens = draw(batch, length, dim), F.softplus(draw(batch, length, dim) - 1)
    return [*tokens, a, draw(batch, length, ndim), draw(batch, length, ndim), draw(dim), draw(batch, dim, ndim)]


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize("length", [1, 7, 32, 71])
def test_portable_equals_definition_with_all_gradients(kind, length):
    where = boundaries(kind, B, length)
    actual = gradients(lambda *a: selective_scan.portable(*a, where), case(length))
    expected = gradients(lambda *a: definitions.selective_scan(*a, where), case(length))
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-11)


def test_without_entry_state_it_is_zero():
    inputs = case(40)
    none = selective_scan.portable(*inputs[:-1])
    zero = selective_scan.portable(*inputs[:-1], torch.zeros_like(inputs[-1]))
    assert all(torch.equal(a, b) for a, b in zip(none, zero, strict=True))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 80), st.data())
def test_any_cut_gives_the_same(length, data):
    inputs = case(length)
    cut = data.draw(st.integers(0, length))
    x, dt, a, b, c, skip, state = inputs
    found = []
    for piece in (slice(0, cut), slice(cut, length)):
        if x[:, piece].shape[1]:
            y, state = selective_scan.portable(x[:, piece], dt[:, piece], a, b[:, piece], c[:, piece], skip, state)
            found.append(y)
    assert_close([torch.cat(found, 1), state], selective_scan.portable(*inputs), 1e-12)


def test_nothing_leaks_between_documents():
    """Gradients of what a document gives to what stands before it are exactly zero."""
    starts = torch.zeros(B, 60, dtype=torch.bool)
    starts[:, 41] = True
    inputs = [t.requires_grad_() for t in case(60)]
    y, leaving = selective_scan.portable(*inputs, Boundaries(starts))
    grads = torch.autograd.grad(y[:, 41:].square().sum() + leaving.square().sum(), inputs)
    assert not any(grads[i][:, :41].any() for i in (0, 1, 3, 4))
    assert not grads[-1].any()
    assert grads[0][:, 41:].all()
