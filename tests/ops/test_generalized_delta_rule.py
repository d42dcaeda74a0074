import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.ops import recurrence_definitions
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.cpu import generalized_delta_rule as cpu
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


def native(*inputs):
    """The op, made sure that it runs natively."""
    assert generalized_delta_rule.implementation(*inputs) is not fast
    return generalized_delta_rule(*inputs)


BOTH = pytest.mark.parametrize("op", [fast, native], ids=["portable", "native"])


def run(op, where):
    return lambda *inputs: op(*inputs, where)


@pytest.mark.parametrize(("kind", "length", "entry"), sampled(BOUNDARIES, [1, 16, 70], [False, True]))
def test_equals_definition_with_all_gradients(kind, length, entry):
    where, inputs = boundaries(kind, B, length), case(length)
    if not entry:
        inputs[-1] = torch.zeros_like(inputs[-1])
    expected = gradients(run(recurrence_definitions.generalized_delta_rule, where), inputs)
    for op, dtype, tolerance in ((fast, torch.float64, 1e-11), (native, torch.float32, 2e-6)):
        actual = gradients(run(op, where), [t.to(dtype) for t in inputs])
        assert_close(actual[0] + actual[1], expected[0] + expected[1], tolerance)


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
    inputs = [t.float() for t in inputs]
    cut, whole = (read_on(inputs, c, starts, native) for c in (sorted(cuts), []))
    assert all(torch.equal(c, w) for c, w in zip(cut, whole, strict=True))  # a recurrence knows of no cuts


def test_packed_equals_separate():
    lengths = [30, 1, 16, 50, 25]
    inputs = [t[:1] for t in case(sum(lengths))[:-1]]
    starts = torch.cat([torch.arange(n)[None] == 0 for n in lengths], 1)
    packed, state = read_on(inputs, [], starts)
    alone = [read_on(part, []) for part in zip(*(t.split(lengths, 1) for t in inputs), strict=True)]
    assert_close([packed, state], [torch.cat([out for out, _ in alone], 1), alone[-1][1]], 1e-12)


@BOTH
def test_nothing_leaks_between_documents_or_backwards(op):
    length, start = 60, 27
    inputs = [t.float().requires_grad_() for t in case(length)]
    starts = torch.zeros(B, length, dtype=torch.bool)
    starts[:, start] = True
    out, leaving = op(*inputs, Boundaries(starts))
    of_second = torch.autograd.grad((out[:, start:].sum(), leaving.sum()), inputs, retain_graph=True)
    assert all(not g[:, :start].any() and g[:, start:].any() for g in of_second[:-1])
    assert not of_second[-1].any()
    of_first = torch.autograd.grad(out[:, :20].sum(), inputs)
    assert all(not g[:, 20:].any() and g[:, :20].any() for g in of_first[:-1])
    assert of_first[-1].any()


@BOTH
def test_strongest_decay_is_exact_enough_in_float32(op):
    """Over a whole chunk of the strongest decay of RWKV-7, beside none at all."""
    inputs = case(64)
    inputs[1] = torch.where(torch.arange(K) % 2 == 0, -math.exp(-0.5), -1e-4).expand_as(inputs[1]).contiguous()
    expected = gradients(run(recurrence_definitions.generalized_delta_rule, None), inputs)
    found = gradients(run(op, None), [t.float() for t in inputs])
    assert_close(found[0] + found[1], expected[0] + expected[1], 2e-5)


@BOTH
def test_bf16_keeps_its_matrix_in_float32(op):
    *tokens, entry = case(50)
    rounded = [*(t.bfloat16() for t in tokens), entry.float()]
    found = op(*rounded)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32]
    expected = recurrence_definitions.generalized_delta_rule(*(t.double() for t in rounded))
    assert_close([found[0]], [expected[0]], 1e-2)
    assert_close([found[1]], [expected[1]], 1e-5)


@pytest.mark.slow
def test_hundred_thousand_tokens_wear_nothing_out():
    inputs = [t.transpose(0, 1).reshape(1, -1, *t.shape[2:]) for t in case(33_000)[:-1]]
    with torch.no_grad():
        expected = fast(*inputs)
        for op in (fast, native):
            found = op(*(t.float() for t in inputs))
            assert_close([found[0][:, -100:], found[1]], [expected[0][:, -100:], expected[1]], 1e-5)


def test_any_decay_natively():
    inputs = case(50)
    inputs[1] = 100 * inputs[1]
    where = boundaries("documents", B, 50)
    found = gradients(run(native, where), [t.float() for t in inputs])
    expected = gradients(run(recurrence_definitions.generalized_delta_rule, where), inputs)
    assert_close(found[0] + found[1], expected[0] + expected[1], 2e-6)


@pytest.mark.slow
def test_operator_is_well_formed():
    inputs = [t.float().requires_grad_() for t in case(20)]
    entry = inputs.pop()
    where = boundaries("documents", B, 20)
    # Not against a graph: what is kept for backward has no gradient, which the check would ask for.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for starts in (None, where.starts):
        torch.library.opcheck(cpu.delta_rule_forward, (*inputs, entry, starts, None, True), test_utils=checks)
