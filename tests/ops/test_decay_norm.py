"""Timestep decay normalisation, portable and native, against the definition in float64."""

import pytest
import torch

from megalodon_lm.ops import reference
from megalodon_lm.ops.decay_norm import decay_norm
from megalodon_lm.ops.timestep_norm import NormState

from .cases import BOUNDARIES, assert_close, boundaries, gradients

B, D, G = 3, 12, 3
COUNT = torch.tensor([5, 0, 100])
NO_SCALE = torch.zeros(4)


def case(length, dim=D, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((B, length, dim), (dim,), (dim,)))
    mean = torch.randn(B, G, generator=g, dtype=torch.float64) * 1e-2
    var = torch.rand(B, G, generator=g, dtype=torch.float64) * 1e-2 + 1e-4
    mean[1], var[1] = 0, 0  # the row that has seen nothing
    wide = torch.promote_types(dtype, torch.float32)
    return [x.to(dtype), w.to(wide), b.to(wide), mean, var]


def run(op, where, **options):
    def call(x, w, b, mean, var):
        y, state = op(x, w, b, G, 1e-5, NormState(COUNT, mean, var), where, **options)
        call.count = state.count
        return y, state.mean, state.var

    return call


def held_to_the_definition(inputs, where, tolerance):
    fast, slow = run(decay_norm, where), run(reference.decay_norm, where)
    actual, expected = gradients(fast, inputs), gradients(slow, [t.double() for t in inputs])
    assert_close(actual[0], expected[0], tolerance)
    assert_close(actual[1], expected[1], 10 * tolerance)
    assert torch.equal(fast.count, slow.count)
    assert fast.count.dtype == torch.int64


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize("length", [1, 7, 64, 150])
def test_portable_equals_reference_with_all_gradients(kind, length):
    held_to_the_definition(case(length), boundaries(kind, B, length), 1e-11)


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize(("length", "dim"), [(1, 12), (7, 48), (64, 12), (150, 48)])
def test_native_equals_reference_with_all_gradients(kind, length, dim):
    held_to_the_definition(case(length, dim, torch.float32), boundaries(kind, B, length), 1e-5)


def test_bf16_in_and_out_lose_no_more_than_their_rounding():
    inputs = case(150, 48, torch.bfloat16)
    actual = gradients(run(decay_norm, None), inputs)
    expected = gradients(run(reference.decay_norm, None), [t.double() for t in inputs])
    assert actual[0][0].dtype == torch.bfloat16
    assert_close(actual[0], expected[0], 5e-3)
    assert_close(actual[1], expected[1], 1e-2)
