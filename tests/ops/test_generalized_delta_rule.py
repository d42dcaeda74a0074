import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.ops import recurrence_definitions
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.generalized_delta_rule import generalized_delta_rule

from .cases import BOUNDARIES, assert_close, boundaries, gradients, sampled

fast = generalized_delta_rule.portable
B, H, K, V = 3, 2, 16, 32


def case(length, seed=0, batch=B):
    """r, log_w, k, v, a, b as RWKV-7 makes them, and a matrix at the entry."""
    g = torch.Generator().manual_seed(seed)
    r, w, k, v, a, rate = (
        torch.randn(batch, length, H, n, generator=g, dtype=torch.float64) for n in (K, K, K, V, K, K)
    )
    kappa = torch.nn.functional.normalize(a, dim=-1)
    log_w = -math.exp(-0.5) * torch.sigmoid(4 * w)
    return [
        r,
        log_w,
        k,
        v,
        -kappa,
        kappa * rate.sigmoid(),
        torch.randn(batch, H, K, V, generator=g, dtype=torch.float64),
    ]


def run(op, where):
    return lambda *inputs: op(*inputs, where)


@pytest.mark.parametrize(("kind", "length", "entry"), sampled(BOUNDARIES, [1, 16, 50], [False, True]))
def test_equals_definition_with_all_gradients(kind, length, entry):
    where, inputs = boundaries(kind, B, length), case(length)
    if not entry:
        inputs[-1] = torch.zeros_like(inputs[-1])
    actual, expected = (
        gradients(run(op, where), inputs) for op in (fast, recurrence_definitions.generalized_delta_rule)
    )
    assert_close(actual[0] + actual[1], expected[0] + expected[1], 1e-11)


def read_on(inputs, cuts, starts=None, op=fast):
    """Output and exit matrix of (r, log_w, k, v, a, b) read in pieces."""
    state, outs = None, []
    for begin, end in zip([0, *cuts], [*cuts, inputs[0].shape[1]], strict=True):
        where = None if starts is None else Boundaries(starts[:, begin:end])
        out, state = op(*(t[:, begin:end] for t in inputs), state, where)
        outs.append(out)
    return torch.cat(outs, 1), state


@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, 49)), packed=st.booleans())
def test_cuts_make_no_difference(cuts, packed):
    inputs = case(50)[:-1]
    starts = boundaries("documents", B, 50).starts if packed else None
    assert_close(read_on(inputs, sorted(cuts), starts), read_on(inputs, [], starts), 1e-12)


def test_packed_equals_separate():
    lengths = [30, 1, 16, 50, 25]
    inputs = [t[:1] for t in case(sum(lengths))[:-1]]
    starts = torch.cat([torch.arange(n)[None] == 0 for n in lengths], 1)
    packed, state = read_on(inputs, [], starts)
    alone = [read_on(part, []) for part in zip(*(t.split(lengths, 1) for t in inputs), strict=True)]
    assert_close([packed, state], [torch.cat([out for out, _ in alone], 1), alone[-1][1]], 1e-12)


def test_nothing_leaks_between_documents_or_backwards():
    length, start = 60, 27
    inputs = [t.float().requires_grad_() for t in case(length)]
    starts = torch.zeros(B, length, dtype=torch.bool)
    starts[:, start] = True
    out, leaving = fast(*inputs, Boundaries(starts))
    of_second = torch.autograd.grad((out[:, start:].sum(), leaving.sum()), inputs, retain_graph=True)
    assert all(not g[:, :start].any() and g[:, start:].any() for g in of_second[:-1])
    assert not of_second[-1].any()
    of_first = torch.autograd.grad(out[:, :20].sum(), inputs)
    assert all(not g[:, 20:].any() and g[:, :20].any() for g in of_first[:-1])
    assert of_first[-1].any()


def test_strongest_decay_is_exact_enough_in_float32():
    """Over a whole chunk of the strongest decay of RWKV-7, beside none at all."""
    inputs = case(64)
    inputs[1] = torch.where(torch.arange(K) % 2 == 0, -math.exp(-0.5), -1e-4).expand_as(inputs[1]).contiguous()
    expected = gradients(run(recurrence_definitions.generalized_delta_rule, None), inputs)
    found = gradients(run(fast, None), [t.float() for t in inputs])
    assert_close(found[0] + found[1], expected[0] + expected[1], 2e-5)


def test_bf16_keeps_its_matrix_in_float32():
    *tokens, entry = case(50)
    rounded = [*(t.bfloat16() for t in tokens), entry.float()]
    found = fast(*rounded)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32]
    expected = recurrence_definitions.generalized_delta_rule(*(t.double() for t in rounded))
    assert_close([found[0]], [expected[0]], 1e-2)
    assert_close([found[1]], [expected[1]], 1e-5)


def test_hundred_thousand_tokens_wear_nothing_out():
    inputs = [t.transpose(0, 1).reshape(1, -1, *t.shape[2:]) for t in case(33_000)[:-1]]
    with torch.no_grad():
        found, expected = fast(*(t.float() for t in inputs)), fast(*inputs)
    assert_close([found[0][:, -100:], found[1]], [expected[0][:, -100:], expected[1]], 1e-5)
