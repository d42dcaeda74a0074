"""Packed documents cost the portable ops no more memory than one document of the same length."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.cema import cema, cema_coefficients
from megalodon_lm.ops.chunk_attention import chunk_attention
from megalodon_lm.ops.decay_norm import decay_norm
from megalodon_lm.ops.timestep_norm import timestep_norm

LENGTH, CHUNK, DIM = 1024, 256, 32


def draw(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, requires_grad=True) for s in shapes]


def attention(where):
    inputs = draw((1, LENGTH, 1, 64), (1, LENGTH, 1, 64), (1, LENGTH, 1, 128))
    out, cache = chunk_attention.portable(*inputs, CHUNK, 1e4, None, where)
    return inputs, (out, cache.keys, cache.values)


def average(where):
    parameters = draw((DIM, 16, 1), (DIM, 16, 1), (DIM, 1, 1), (DIM, 16, 2))
    inputs = draw((1, LENGTH, DIM), (DIM,))
    return inputs + parameters, cema.portable(inputs[0], *cema_coefficients(*parameters), inputs[1], None, where)


def norm(where, op=timestep_norm):
    inputs = draw((1, LENGTH, DIM), (DIM,), (DIM,))
    y, state = op.portable(*inputs, 4, 1e-5, None, where)
    return inputs, (y, state.mean, state.var)


def norm_that_forgets(where):
    return norm(where, decay_norm)


def peak(run, where):
    """Most bytes of tensors alive at a time, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as measured:
        inputs, outputs = run(where)
        torch.autograd.grad(sum(t.sum() for t in outputs), inputs)
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(changes.cumsum(0).max())


@pytest.mark.parametrize("run", [attention, average, norm, norm_that_forgets])
def test_packed_documents_cost_no_more_memory_than_one(run):
    one = peak(run, None)
    for size in (1, 16):
        starts = torch.zeros(1, LENGTH, dtype=torch.bool)
        starts[0, ::size] = True
        assert peak(run, Boundaries(starts)) < 1.1 * one, size
