"""Causal attention to a number of tokens before each, as an operator.

Rows are cut into groups, one chunk or several short ones; keys of a chunk that the next one sees belong to two groups.
Groups of few queries are computed in one go; all others by products in squares, where the processor has some
(squares_attention), or by matrix products of PyTorch, long ones by themselves (tiled_attention) and short ones together
(batched_attention).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..finite import finite_part
from ..windowed_attention import spoilt
from . import attention_kernels as kernels
from . import batched_attention, squares_attention, tiled_attention
from .attention_operands import operands
from .finite import is_finite
from .operators import form
from .simd import as_numpy
from .team import num_threads

MERGED_KEYS = 256  # short documents are taken together up to so many
FEW_QUERIES = 8


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, slots: Tensor
) -> Tensor:
    """Softmax attention with scale 1 of each token to itself and as many tokens before it as its slot says.

    Args:
        q, k: (B, L, H, dk), rotated, float32 or bf16.
        v: (B, L, H, dv).
        keys, values: (B, n, H, d) the cache at the entry, or None for an empty one.
        slots: (B, L) int64, -1 at padding; they rise by one but where what is seen begins later; see attention_kernels.

    Returns:
        (B, L, H, dv), zero at padding.
    """
    return form(attention_forward, _forward, q, k, v, keys, values)(q, k, v, keys, values, slots)[0]


def _plan(slots: Tensor, keys: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Ends (B, n + L), with n entries of the cache, and groups (M, 5)."""
    slots_of = as_numpy(slots.contiguous())
    batch, length = slots_of.shape
    ends = np.empty((batch, length if keys is None else keys.shape[1] + length), np.int64)
    groups = np.empty((batch * length, 5), np.int64)
    count = kernels.plan_groups(slots_of, MERGED_KEYS, ends, groups)
    return ends, groups[:count]


def _by_products(q: Tensor, v: Tensor, groups: np.ndarray) -> list[tuple[Any, np.ndarray]]:
    """The modules that multiply matrices for groups, each with its own, in this order: the last one adds gradients."""
    if squares_attention.fits(q, v):
        shares = [(squares_attention, groups)]
    else:
        short = batched_attention.short(groups, tiled_attention.tile_size(q))
        shares = [(tiled_attention, groups[~short]), (batched_attention, groups[short])]
    return [(module, own) for module, own in shares if len(own)]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Output, and logarithms of the softmax's sums: (H, n) for each group in turn, flat."""
    slots = slots.contiguous()
    _, groups = _plan(slots, keys)
    heads = q.shape[2]
    num_queries = groups[:, 2] - groups[:, 1]
    everywhere = num_queries.sum() == slots.numel()
    fresh = v.new_empty if everywhere else v.new_zeros
    out, sums = fresh(v.shape), fresh(slots.numel() * heads, dtype=torch.float32)
    given, few = operands(q, k, v, keys, values), num_queries <= FEW_QUERIES
    if few.any():
        some = groups[few]
        shape = (len(some), heads, int(num_queries[few].max()), int((num_queries + groups[:, 3])[few].max()))
        places = (as_numpy(slots), some, np.empty(shape, np.float32))
        kernels.attend_few(num_threads(), *given.arrays(), *places, as_numpy(out), as_numpy(sums))
    if not few.all():
        shares = _by_products(q, v, groups[~few])
        for module, own in shares:
            module.forward(given, slots, own, out, sums)
        if not is_finite(out, slots):  # products with the zeros of hidden keys
            finite = given._replace(v=finite_part(v), values=finite_part(given.values))
            for module, own in shares:
                module.forward(finite, slots, own, out, sums)
            out.masked_fill_(spoilt(v, values, slots), torch.nan)
    return out, sums


@torch.library.custom_op("megalodon::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """_forward as an operator."""
    return _forward(q, k, v, keys, values, slots)


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, slots: Tensor) -> Any:
    return v.new_empty(v.shape), v.new_empty(q.shape[0] * q.shape[1] * q.shape[2], dtype=torch.float32)


@torch.library.custom_op("megalodon::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    slots: Tensor,
    out: Tensor,
    sums: Tensor,
    to_cache: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v, keys and values; the last two empty unless those to the cache are asked for."""
    ends, groups = _plan(slots, keys)
    everywhere = (groups[:, 2] - groups[:, 1]).sum() == slots.numel()
    grads = [q.new_empty(q.shape) if everywhere else q.new_zeros(q.shape), *(t.new_zeros(t.shape) for t in (k, v))]
    cached = [t.new_zeros(t.shape) if to_cache and t is not None else None for t in (keys, values)]
    given, to = operands(q, k, v, keys, values), operands(*grads, *cached)
    for module, own in _by_products(q, v, groups):
        module.backward(grad, given, ends, own, out, sums, to)
    return to.q, to.k, to.v, *(q.new_empty(0) if t is None else t for t in cached)


@attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    slots: Tensor,
    out: Tensor,
    sums: Tensor,
    to_cache: bool,
) -> Any:
    cached = (t.new_empty(t.shape) if to_cache and t is not None else q.new_empty(0) for t in (keys, values))
    return *(t.new_empty(t.shape) for t in (q, k, v)), *cached


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: None) -> Any:
    saved = ctx.saved_tensors  # asked for once: checkpointing allows no second time
    to_cache = any(ctx.needs_input_grad[3:5])  # not where a state is carried on as it is
    *grads, grad_keys, grad_values = attention_backward(grad.contiguous(), *saved, to_cache)
    return *grads, *((grad_keys, grad_values) if to_cache else (None, None)), None


attention_forward.register_autograd(_backward, setup_context=_save)
