"""torch.compile takes the portable ops as one graph, with states and documents, and gives what they give without it."""

import pytest
import torch

from megalodon_lm.ops.cema import cema, cema_coefficients
from megalodon_lm.ops.chunk_attention import KeyValueCache, chunk_attention
from megalodon_lm.ops.timestep_norm import NormState, timestep_norm

from .cases import boundaries

B, L, C = 3, 90, 32


def draw(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def case():
    """Tokens, states at the entry and parameters."""
    x, keys, values, mean, var, h = draw((B, L, 8), (B, C, 2, 4), (B, C, 2, 4), (B, 2), (B, 2), (B, 8, 2, 2))
    return [x, keys, values, mean, var.square(), h, *draw((8, 2, 1), (8, 2, 1), (8, 1, 1), (8, 2, 2), (8,))]


def ops(x, keys, values, mean, var, h, alpha, delta, theta, gamma, weight, count, fill, where):
    """All ops that have a state, one after the other; a total of everything they give."""
    y, norm = timestep_norm(x, weight, weight, 2, 1e-5, NormState(count, mean, var), where)
    z, h = cema(y, *cema_coefficients(alpha, delta, theta, gamma), weight, h, where)
    used = (torch.arange(C) < fill[:, None])[..., None, None]
    cache = KeyValueCache(torch.where(used, keys, 0), torch.where(used, values, 0), fill)
    heads = z.unflatten(-1, (2, -1))
    out, leaving = chunk_attention(heads, heads, y.unflatten(-1, (2, -1)), C, 1e4, cache, where)
    total = sum(t.square().sum() for t in (out, leaving.keys, leaving.values, norm.mean, norm.var, h))
    return total, (norm.count, leaving.fill)


@pytest.mark.parametrize("kind", ["none", "documents", "padding"])
def test_ops_compile_as_one_graph(kind):
    counts = torch.tensor([3, 100, 7]), torch.tensor([5, 31, 0]), boundaries(kind, B, L)
    compiled = torch.compile(ops, fullgraph=True, backend="aot_eager")
    found = []
    for run in (ops, compiled):
        inputs = [t.requires_grad_() for t in case()]
        total, exits = run(*inputs, *counts)
        found.append([total, *exits, *torch.autograd.grad(total, inputs)])
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-9, atol=1e-9)
