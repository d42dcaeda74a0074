"""The selective scan, portable and native, against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.ops import recurrence_definitions as definitions
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.cpu import selective_scan as native
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


def narrow(inputs, dtype=torch.float32):
    """The inputs in float32, with what a layer computes in the type of autocast in that: x, b and c."""
    return [t.to(dtype if i in (0, 3, 4) else torch.float32) for i, t in enumerate(inputs)]


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize(("length", "dim", "ndim"), [(1, 40, 3), (7, 64, 16), (64, 40, 1), (150, 40, 3)])
def test_native_equals_definition_with_all_gradients(kind, length, dim, ndim):
    where = boundaries(kind, B, length)
    inputs = narrow(case(length, dim, ndim))
    actual = gradients(lambda *a: native.selective_scan(*a, where), inputs)
    expected = gradients(lambda *a: definitions.selective_scan(*a, where), [t.double() for t in inputs])
    assert_close(actual[0], expected[0], 5e-6)
    assert_close(actual[1], expected[1], 1e-5)


@pytest.mark.parametrize("kind", BOUNDARIES)
def test_native_of_bf16_loses_no_more_than_its_rounding(kind):
    where = boundaries(kind, B, 150)
    inputs = narrow(case(150, 40), torch.bfloat16)
    actual = gradients(lambda *a: selective_scan(*a, where), inputs)
    expected = gradients(lambda *a: definitions.selective_scan(*a, where), [t.double() for t in inputs])
    assert [t.dtype for t in actual[0]] == [torch.bfloat16, torch.float32]
    assert_close(actual[0], expected[0], 5e-3)
    assert_close(actual[1], expected[1], 1e-2)


def test_native_without_gradients_and_without_entry_state():
    inputs = [t.requires_grad_() for t in narrow(case(70, 40))[:-1]]
    with torch.no_grad():
        actual = native.selective_scan(*inputs)
        expected = definitions.selective_scan(*(t.double() for t in inputs))
    assert not any(t.requires_grad for t in actual)
    assert_close(actual, expected, 5e-6)


def test_native_is_the_same_for_every_number_of_threads():
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(lambda *a: native.selective_scan(*a), narrow(case(100, 128, 16))))
    torch.set_num_threads(2)
    for other in found[1:]:
        for one, two in zip([*found[0][0], *found[0][1]], [*other[0], *other[1]], strict=True):
            assert torch.equal(one, two)


def test_small_steps_over_a_long_piece_stay_accurate():
    """Decays of 1 - 1e-4: rounding that added up over the memory would show."""
    x, dt, a, b, c, skip, _ = case(3000, 8, 4, batch=1)
    inputs = narrow([x, dt * 1e-3, a.clamp(min=-0.1), b, c, skip])
    actual = gradients(lambda *t: native.selective_scan(*t), inputs)
    expected = gradients(lambda *t: selective_scan.portable(*t), [t.double() for t in inputs])
    assert_close(actual[0], expected[0], 5e-5)
    assert_close(actual[1], expected[1], 5e-5)


def loss(x, dt, a, b, c, skip, state, starts, lengths):
    y, h = selective_scan(x, dt, a, b, c, skip, state, Boundaries(starts, lengths))
    return y.square().sum() + h.square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_as_one_graph(dtype):
    """In float64 by the portable op."""
    where = boundaries("both", B, 40)
    inputs = [t.to(dtype).requires_grad_() for t in case(40)]
    expected = torch.autograd.grad(loss(*inputs, where.starts, where.lengths), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*inputs, where.starts, where.lengths), inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
