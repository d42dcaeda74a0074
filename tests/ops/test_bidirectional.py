"""The ops of the encoder against their definitions, and what padding and chunks may not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.ops import bidirectional_definitions as definitions
from megalodon_lm.ops.bidirectional_attention import bidirectional_attention
from megalodon_lm.ops.bidirectional_cema import bidirectional_cema
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.cema import cema_coefficients, ema_coefficients
from megalodon_lm.ops.padding import reverse, zero_padding
from megalodon_lm.ops.sequence_norm import sequence_norm

from .cases import assert_close, boundaries, gradients

B, D, N, H = 3, 4, 3, 2


def draw(*shapes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=dtype) for s in shapes]


def averages(rotating, length, dtype=torch.float64):
    """x, parameters of both averages and omega."""
    parts = [(D, N, 1), (D, N, 1), (D, 1, 1), (D, N, 2)] if rotating else [(D, N, 1)] * 3
    return draw((B, length, D), *parts, *parts, (D,), dtype=dtype)


def run_cema(op, rotating, where):
    make, count = (cema_coefficients, 4) if rotating else (ema_coefficients, 3)

    def run(x, *rest):
        return [op(x, make(*rest[:count]), make(*rest[count:-1]), rest[-1], where)]

    return run


@pytest.mark.parametrize("kind", ["none", "padding"])
@pytest.mark.parametrize("rotating", [True, False])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_cema_equals_definition_with_all_gradients(kind, rotating, length):
    where, inputs = boundaries(kind, B, length), averages(rotating, length)
    actual = gradients(run_cema(bidirectional_cema, rotating, where), inputs)
    expected = gradients(run_cema(definitions.bidirectional_cema, rotating, where), inputs)
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-11)
    natively = gradients(run_cema(bidirectional_cema, rotating, where), [t.float() for t in inputs])
    assert_close(natively[0], expected[0], 1e-5)
    assert_close(natively[1], expected[1], 1e-4)


def test_cema_backwards_excludes_the_step_itself():
    x, *rest = averages(True, 6)
    none = torch.zeros_like(rest[-1])
    silent = (rest[0].new_zeros(D, N), *cema_coefficients(*rest[:4])[1:])
    y = bidirectional_cema(x, silent, cema_coefficients(*rest[4:8]), none)
    assert (y[:, -1] == 0).all()
    assert (y[:, :-1] != 0).all()
    x.requires_grad_()
    y = bidirectional_cema(x, silent, cema_coefficients(*rest[4:8]), none)
    (grad,) = torch.autograd.grad(y[:, 3].sum(), x)
    assert (grad[:, :4] == 0).all()
    assert (grad[:, 4:] != 0).all()


@pytest.mark.parametrize("late", [0, 1])
def test_reversing_is_within_the_length_of_each_row(late):
    x = torch.arange(1.0, 11).view(2, 5, 1)
    lengths = torch.tensor([5, 3])
    expected = {0: [[5, 4, 3, 2, 1], [8, 7, 6, 0, 0]], 1: [[0, 5, 4, 3, 2], [0, 8, 7, 0, 0]]}[late]
    assert reverse(x, lengths, late)[..., 0].tolist() == expected
    assert torch.equal(reverse(x[:1], None, late), reverse(x[:1], lengths[:1], late))


@pytest.mark.parametrize("kind", ["none", "padding"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [2, 9])
def test_norm_equals_definition_with_all_gradients(kind, groups, length):
    where, inputs = boundaries(kind, B, length), draw((B, length, D), (D,), (D,))
    actual = gradients(lambda *a: [sequence_norm(*a, groups, 1e-5, where)], inputs)
    expected = gradients(lambda *a: [definitions.sequence_norm(*a, groups, 1e-5, where)], inputs)
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-10)


@pytest.mark.parametrize("lengths", [None, (150, 0, 63), (1, 64, 2)])
def test_norm_of_each_feature_natively_equals_definition(lengths):
    where = None if lengths is None else Boundaries(None, torch.tensor(lengths))
    inputs = [t + 5 * (i == 0) for i, t in enumerate(draw((B, 150, 32), (32,), (32,), seed=1))]

    def run(op):
        return lambda *a: [op(*a, 32, 1e-5, where)]

    expected = gradients(run(definitions.sequence_norm), inputs)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        given = [inputs[0].to(dtype), *(t.float() for t in inputs[1:])]
        assert sequence_norm.implementation(*given, 32, 1e-5, where) is not sequence_norm.portable
        rounded = gradients(run(definitions.sequence_norm), [t.double() for t in given])
        actual = gradients(run(sequence_norm), given)
        assert actual[0][0].dtype == actual[1][0].dtype == dtype
        assert_close(actual[0], rounded[0], near)
        assert_close(actual[1], rounded[1], 10 * near)
    assert_close(gradients(run(sequence_norm), inputs)[0], expected[0], 1e-12)
    if where is not None:
        x = inputs[0].float()
        x[~where.valid(150)] = math.nan
        y = sequence_norm(x, *(t.float() for t in inputs[1:]), 32, 1e-5, where)
        assert (y[~where.valid(150)] == 0).all()
        assert y.isfinite().all()


@given(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=2, max_size=2), st.integers(0, 1))
@settings(deadline=None, max_examples=30)
def test_padding_is_zeroed_and_rows_reversed_natively_as_by_choosing(length, lengths, late):
    (x,) = draw((2, length, 3), dtype=torch.float32)
    ends = torch.tensor(lengths).clamp(max=length)
    x[~Boundaries(None, ends).valid(length)] = math.nan
    for op, more in ((zero_padding, ()), (reverse, (late,))):
        assert op.implementation(x, ends, *more) is not op.portable
        found = gradients(lambda t, op=op, more=more: [op(t, ends, *more)], [x])
        expected = gradients(lambda t, op=op, more=more: [op.portable(t, ends, *more)], [x])
        assert_close(found[0], expected[0], 0)
        assert_close(found[1], expected[1], 0)


def test_norm_of_a_feature_has_mean_0_and_variance_1_over_its_valid_steps():
    (x,) = draw((2, 50, D))
    y = sequence_norm(3 * x + 7, torch.zeros(D), torch.zeros(D), D, 0.0, Boundaries(None, torch.tensor([50, 20])))
    for row, length in zip(y, (50, 20), strict=True):
        torch.testing.assert_close(row[:length].mean(0), torch.zeros(D, dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(row[:length].var(0, unbiased=False), torch.ones(D, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["none", "padding"])
@pytest.mark.parametrize("weights", ["softmax", "laplace"])
@pytest.mark.parametrize("chunk", [0, 4, 16])
def test_attention_equals_definition_with_all_gradients(kind, weights, chunk):
    length = 11
    where, inputs = boundaries(kind, B, length), draw(*[(B, length, H, 6)] * 2, (B, length, H, 5))
    inputs[0] *= 3  # so that scores reach both ends of the Laplace function
    given = (chunk, 1e4, weights, where)
    actual = gradients(lambda *a: [bidirectional_attention(*a, *given)], inputs)
    expected = gradients(lambda *a: [definitions.bidirectional_attention(*a, *given)], inputs)
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-11)


@pytest.mark.parametrize("weights", ["softmax", "laplace"])
def test_attention_natively_equals_definition(weights):
    where, inputs = boundaries("padding", B, 20), draw(*[(B, 20, H, 6)] * 2, (B, 20, H, 5), seed=1)
    expected = gradients(lambda *a: [definitions.bidirectional_attention(*a, 8, 1e4, weights, where)], inputs)
    actual = gradients(lambda *a: [bidirectional_attention(*a, 8, 1e4, weights, where)], [t.float() for t in inputs])
    assert_close(actual[0], expected[0], 1e-5)
    assert_close(actual[1], expected[1], 1e-4)


def test_attention_in_tiles_equals_that_in_one(monkeypatch):
    inputs, where = draw(*[(2, 11, 1, 4)] * 3), Boundaries(None, torch.tensor([11, 7]))
    whole = bidirectional_attention(*inputs, 0, 1e4, "softmax", where)
    monkeypatch.setattr("megalodon_lm.ops.bidirectional_attention.TILE_SIZE", 4)
    assert_close([bidirectional_attention(*inputs, 0, 1e4, "softmax", where)], [whole], 1e-13)


OPS = {
    "cema": lambda x, w: run_cema(bidirectional_cema, True, w)(x, *averages(True, 1)[1:])[0],
    "norm": lambda x, w: sequence_norm(x, torch.ones(D), torch.ones(D), 2, 1e-5, w),
    "softmax": lambda x, w: bidirectional_attention(*[x.unflatten(2, (H, -1))] * 3, 5, 1e4, "softmax", w),
    "laplace": lambda x, w: bidirectional_attention(*[x.unflatten(2, (H, -1))] * 3, 5, 1e4, "laplace", w),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@settings(deadline=None, max_examples=12)
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=3).filter(any))
def test_padded_rows_are_as_by_themselves_and_padding_leaves_no_trace(op, lengths):
    (x,) = draw((len(lengths), 12, D))
    x.requires_grad_()
    where = Boundaries(None, torch.tensor(lengths))
    y = op(x, where)
    for row, length in enumerate(lengths):
        assert (y[row, length:] == 0).all()
        if length:
            alone = op(x[row : row + 1, :length], None)
            torch.testing.assert_close(y[row, :length], alone[0], rtol=1e-11, atol=1e-11)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert all((grad[row, length:] == 0).all() for row, length in enumerate(lengths))
    spoilt = x.detach().clone()
    for row, length in enumerate(lengths):
        spoilt[row, length:] = torch.nan
    spoilt.requires_grad_()
    again = op(spoilt, where)
    assert torch.equal(again, y)
    (grad_again,) = torch.autograd.grad(again.square().sum(), spoilt)
    torch.testing.assert_close(grad_again, grad, rtol=1e-12, atol=1e-12)
