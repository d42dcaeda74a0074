"""Recurrences of matrices in chunks against their definitions in float64, token by token."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.ops import recurrence_definitions
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.gated_delta_rule import gated_delta_rule, unit_lower_inverse
from megalodon_lm.ops.state_space_duality import state_space_duality

from .cases import BOUNDARIES, assert_close, boundaries, gradients

B, H, G, N, P = 3, 4, 2, 5, 3
OPS = pytest.mark.parametrize("op", [gated_delta_rule, state_space_duality], ids=lambda op: op.name)


def case(op, length, batch=B, seed=0):
    """Inputs in float64, the state at the entry last; some decays are strong, and keys are much alike."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(batch, *shape, generator=g, dtype=torch.float64)

    log_decay, state = -(3 * normal(length, H) - 2).exp(), normal(H, N, P)
    if op is state_space_duality:
        x, b, c, step = normal(length, H, P), normal(length, G, N), normal(length, G, N), normal(length, H).exp()
        return [x, b, c, log_decay, step, torch.randn(H, generator=g, dtype=torch.float64), state]
    k = F.normalize(normal(length, H, N) + normal(1, H, N), dim=-1)
    return [normal(length, H, N), k, normal(length, H, P), log_decay, (4 * normal(length, H)).sigmoid(), state]


def at(inputs, begin, end):
    """The inputs of some tokens, without the state."""
    return [t[:, begin:end] if t.dim() > 1 else t for t in inputs[:-1]]


@OPS
@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize("length", [1, 7, 64, 130])
def test_equals_definition_with_all_gradients(op, kind, length):
    where, definition = boundaries(kind, B, length), getattr(recurrence_definitions, op.name)
    for inputs in (case(op, length), case(op, length)[:-1])[: 1 if length > 64 else 2]:
        actual = gradients(lambda *a: op(*a, boundaries=where), inputs)
        expected = gradients(lambda *a: definition(*a, boundaries=where), inputs)
        assert_close(actual[0], expected[0], 1e-12)
        assert_close(actual[1], expected[1], 1e-11)


@OPS
@given(st.data())
@settings(max_examples=10, deadline=None)
def test_any_cut_gives_the_same(op, data):
    """Outputs, exit state and all gradients."""
    length = data.draw(st.integers(2, 90))
    cut = data.draw(st.integers(1, length - 1))
    where = boundaries(data.draw(st.sampled_from(["none", "documents"])), B, length, data.draw(st.integers(0, 99)))
    parts = [None, None] if where is None else [Boundaries(s) for s in where.starts.split([cut, length - cut], 1)]

    def pieces(*inputs):
        first, state = op(*at(inputs, 0, cut), inputs[-1], parts[0])
        second, state = op(*at(inputs, cut, length), state, parts[1])
        return torch.cat([first, second], 1), state

    actual = gradients(pieces, case(op, length))
    expected = gradients(lambda *a: op(*a, where), case(op, length))
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-11)


@OPS
@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(0, 20))
@settings(max_examples=10, deadline=None)
def test_packed_and_padded_equals_separate(op, sizes, padding):
    """The first document goes on from the entry; the state is that of the last one."""
    length = sum(sizes)
    inputs = case(op, length + padding, batch=1)
    starts = torch.zeros(1, length + padding, dtype=torch.bool)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    starts[0, ends[:-1]] = True
    y, state = op(*inputs, Boundaries(starts, torch.tensor([length])))
    alone = [
        op(*at(inputs, end - size, end), None if i else inputs[-1])
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    assert_close([y[:, :length]], [torch.cat([y for y, _ in alone], 1)], 1e-12)
    assert not y[:, length:].any()
    assert_close([state], [alone[-1][1]], 1e-12)


@OPS
def test_nothing_leaks(op):
    """No gradient at all reaches earlier documents, the entry state, later tokens or padding."""
    inputs = [t.requires_grad_() for t in case(op, 20)]
    starts = torch.zeros(B, 20, dtype=torch.bool)
    starts[:, 8] = True
    y, state = op(*inputs, Boundaries(starts, torch.tensor([20, 15, 15])))
    *grads, to_state = torch.autograd.grad(y[:, 9:12].sin().sum(), inputs, retain_graph=True)
    for grad in (grad for grad in grads if grad.dim() > 1):
        assert grad[:, 9:12].any()
        assert not grad[:, :8].any()
        assert not grad[:, 12:].any()
    assert not to_state.any()
    grads = torch.autograd.grad(y.sum() + state.sum(), inputs[:-1])
    for grad in (grad for grad in grads if grad.dim() > 1):
        assert grad[1:, 8:15].any()
        assert not grad[1:, 15:].any()


@OPS
def test_bf16_loses_no_more_than_its_rounding(op):
    """Matrix products in bf16; decays and states in float32."""
    inputs = case(op, 100)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(op, [t.float() for t in inputs])
        y, state = op(*(t.float() for t in inputs))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected = gradients(op, inputs)
    assert_close(actual[0], expected[0], 2e-2)
    assert_close(actual[1], expected[1], 4e-2)


@OPS
@pytest.mark.parametrize("length", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_stays_true_over_many_tokens(op, length):
    """float32 in pieces against float64 in one, with decays near 1 and keys that repeat."""
    inputs = case(op, length, batch=1)
    inputs[3] = inputs[3].clamp(min=-1) * 1e-4
    state = inputs[-1].float()
    for begin in range(0, length, 2_000):
        y, state = op(*(t.float() for t in at(inputs, begin, begin + 2_000)), state)
    expected = op(*inputs)
    assert_close([y, state], [expected[0][:, -2_000:], expected[1]], 1e-4)


@OPS
def test_decays_of_any_strength_are_finite(op):
    """Decays to nothing beside none at all, with gradients."""
    inputs = case(op, 100)
    inputs[3] = torch.where(inputs[3] < -1, -1e4, 0.0)
    for outputs in gradients(op, [t.float() for t in inputs]):
        assert all(t.isfinite().all() for t in outputs)


@pytest.mark.parametrize("size", [1, 8, 13, 64])
def test_inverse_of_unit_triangular_matrices(size):
    """Ones everywhere below the diagonal: of a series of powers of this, float32 would keep nothing."""
    lower = torch.ones(2, size, size).tril(-1)
    inverse = unit_lower_inverse(lower)
    assert torch.equal(inverse @ (lower + torch.eye(size)), torch.eye(size).expand(2, -1, -1))
    assert torch.equal(inverse, inverse.tril())
