"""The native TimestepNorm against the definition in float64."""

import pytest
import torch

from megalodon_lm.ops import reference
from megalodon_lm.ops.cpu import timestep_norm as native
from megalodon_lm.ops.cpu import timestep_norm_kernels as kernels
from megalodon_lm.ops.cpu.decay_norm import decay_norm
from megalodon_lm.ops.cpu.timestep_norm import timestep_norm
from megalodon_lm.ops.timestep_norm import NormState

from .cases import BOUNDARIES, assert_close, boundaries, gradients

B, G = 3, 2
COUNT = torch.tensor([5, 0, 100])


def case(length, dim, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g) for s in ((B, length, dim), (dim,), (dim,)))
    mean = torch.randn(B, G, generator=g, dtype=torch.float64)
    var = torch.rand(B, G, generator=g, dtype=torch.float64) + 0.1
    mean[1], var[1] = 0, 0
    return [x.to(dtype), w, b, mean, var]


def run(op, where, **options):
    def call(x, w, b, mean, var):
        y, state = op(x, w, b, G, 1e-5, NormState(COUNT, mean, var), where, **options)
        call.count = state.count
        return y, state.mean, state.var

    return call


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize(("length", "dim"), [(1, 12), (7, 64), (64, 12), (150, 64)])
def test_equals_reference_with_all_gradients(kind, length, dim):
    where = boundaries(kind, B, length)
    fast, slow = run(timestep_norm, where), run(reference.timestep_norm, where)
    actual = gradients(fast, case(length, dim))
    expected = gradients(slow, [t.double() for t in case(length, dim)])
    assert_close(actual[0], expected[0], 1e-5)
    assert_close(actual[1], expected[1], 1e-4)
    assert torch.equal(fast.count, slow.count)


def test_more_groups_than_one_task_follows():
    g = torch.Generator().manual_seed(0)
    groups = kernels.TOGETHER + 3
    x, w, b = (torch.randn(s, generator=g) for s in ((2, 30, 16 * groups), (16 * groups,), (16 * groups,)))
    mean, var = (torch.rand(2, groups, generator=g, dtype=torch.float64) for _ in range(2))

    def run(op):
        def call(x, w, b, mean, var):
            y, state = op(x, w, b, groups, 1e-5, NormState(COUNT[:2], mean, var))
            return y, state.mean, state.var

        return call

    actual = gradients(run(timestep_norm), [x, w, b, mean, var])
    expected = gradients(run(reference.timestep_norm), [t.double() for t in (x, w, b, mean, var)])
    assert_close(actual[0], expected[0], 1e-5)
    assert_close(actual[1], expected[1], 1e-4)


def test_bf16_in_and_out_lose_no_more_than_their_rounding():
    inputs = case(150, 64, torch.bfloat16)
    actual = gradients(run(timestep_norm, None), inputs)
    expected = gradients(run(reference.timestep_norm, None), [t.double() for t in inputs])
    assert actual[0][0].dtype == torch.bfloat16
    assert_close(actual[0], expected[0], 5e-3)
    assert_close(actual[1], expected[1], 1e-2)
    y, _ = timestep_norm(*case(150, 64)[:3], G, out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("norm", [timestep_norm, decay_norm])
def test_same_bits_every_time_and_for_every_number_of_threads(norm):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients(run(norm, None), case(100, 64)))
    torch.set_num_threads(2)
    for other in found[1:]:
        for a, b in zip([*found[0][0], *found[0][1]], [*other[0], *other[1]], strict=True):
            assert torch.equal(a, b)


def test_statistics_may_lie_in_any_order_in_memory():
    inputs = case(20, 12)
    turned = [*inputs[:3], *(t.t().contiguous().t() for t in inputs[3:])]
    assert not turned[3].is_contiguous()
    expected = gradients(run(reference.timestep_norm, None), [t.double() for t in inputs])
    actual = gradients(run(timestep_norm, None), turned)
    assert_close(actual[0], expected[0], 1e-5)
    assert_close(actual[1], expected[1], 1e-4)
    with torch.no_grad():
        assert_close(run(timestep_norm, None)(*turned), expected[0], 1e-5)


def test_does_not_drift_over_a_million_tokens():
    generator = torch.Generator().manual_seed(0)
    zero, state, total = torch.zeros(4), None, torch.zeros(2).double()
    for _ in range(10):
        x = 1000 + torch.randn(1, 100_000, 4, generator=generator)
        _, state = timestep_norm(x, zero, zero, 2, state=state)
        total += x.double().view(-1, 2, 2).transpose(0, 1).flatten(1).sum(1)
    assert (state.mean[0] - total / 2_000_000).abs().max() < 1e-5
    assert (state.var[0] - 1).abs().max() < 1e-2


def test_operator_is_well_formed_and_compiles():
    x, w, b, mean, var = (t.requires_grad_() for t in case(20, 12))
    settings = (G, 1e-5, *kernels.CUMULATIVE, torch.float32)
    starts, lengths = torch.rand(B, 20) < 0.2, torch.tensor([20, 3, 0])
    torch.library.opcheck(native.norm_over_time_forward, (x, w, b, mean, var, COUNT, starts, lengths, *settings))
    torch.library.opcheck(native.norm_over_time_forward, (x, w, b, *[None] * 5, *settings))

    def loss(x):
        return timestep_norm(x, w, b, G, state=NormState(COUNT, mean, var))[0].square().sum()

    expected = torch.autograd.grad(loss(x), x)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], expected)
