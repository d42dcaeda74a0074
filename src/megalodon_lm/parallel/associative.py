"""Layers whose states can be combined: what two pieces leave follows from what each leaves of an empty state.

So ranks need not wait for each other along a sequence: each reads its part from an empty state, all exchange what that
left, and each puts together the state at its own entry.
"""

import torch
from torch import Tensor, nn

from ..layers.complex_ema import ComplexEMA
from ..layers.norms import DecayNorm, NormOverTime, TimestepNorm
from ..ops.decay_norm import MEAN_DECAY, VAR_DECAY
from ..ops.timestep_norm import NormState
from ..state_spec import Tree

ASSOCIATIVE = (NormOverTime, ComplexEMA)
"""Layers whose forward is (x, state, boundaries), and whose state goes on from one rank to the next by `combine`."""


def combine(layer: nn.Module, before: Tree, total: Tree, length: Tensor, begins: Tensor) -> Tree:
    """The state after a part of a sequence.

    Args:
        layer: whose state it is.
        before: at the entry of the part.
        total: what the part leaves of an empty state.
        length: (B,) int64 on the CPU, tokens of each row in the part.
        begins: (B,) bool on the CPU, rows in which a document begins in the part: what came before is forgotten.
    """
    if isinstance(layer, ComplexEMA):
        return _combine_averages(layer, before, total, length, begins)
    forgotten = begins.to(before.count.device)
    kept = NormState(*(t.masked_fill(forgotten.view(-1, *[1] * (t.dim() - 1)), 0) for t in before))
    if isinstance(layer, DecayNorm):
        n = total.count[:, None].double()
        return NormState(
            kept.count + total.count, kept.mean * MEAN_DECAY**n + total.mean, kept.var * VAR_DECAY**n + total.var
        )
    assert isinstance(layer, TimestepNorm)
    count = kept.count + total.count
    share = (total.count / count.clamp(min=1).double())[:, None]
    apart = total.mean - kept.mean
    mean = kept.mean + apart * share
    var = kept.var * (1 - share) + total.var * share + apart.square() * (share * (1 - share))
    return NormState(count, mean, var)


def _combine_averages(layer: ComplexEMA, before: Tensor, total: Tensor, length: Tensor, begins: Tensor) -> Tensor:
    """h after n tokens is q^n h + what they add."""
    _, q, _ = layer.coefficients()
    decay = power(q, length)
    if before.shape[-1] == 1:  # states that do not turn
        carried = before * decay.real[..., None]
    else:
        carried = torch.view_as_real(torch.view_as_complex(before.contiguous()) * decay)
    return carried.masked_fill(begins.to(carried.device).view(-1, 1, 1, 1), 0) + total


def power(q: Tensor, exponents: Tensor) -> Tensor:
    """(B, D, N): q (D, N) to the power of each of B whole numbers on the CPU, by repeated squaring, 0^0 = 1."""
    result = torch.ones_like(q).expand(len(exponents), *q.shape)
    highest = int(exponents.max()) if len(exponents) else 0
    for bit in range(highest.bit_length()):
        chosen = (exponents >> bit & 1).bool().to(q.device).view(-1, 1, 1)
        result = torch.where(chosen, result * q, result)
        q = q * q
    return result
