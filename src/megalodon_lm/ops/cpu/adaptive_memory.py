"""Adaptive memory on the CPU: the same function as the portable one, as one operator with fake and autograd."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import adaptive_memory as portable
from ..adaptive_memory import MemoryState, ValueCache, empty_state, unfinished_values
from ..backend import implements
from ..boundaries import Boundaries
from . import memory_products
from .memory_products import Grads, Kept, make_kept
from .open_chunk import open_chunk
from .operators import form
from .simd import LANES

FEWEST_PRODUCTS = 1 << 22  # multiplications of a chunk, or of the part of one, that are worth the calls for it


def _fits(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, *_: Any, **__: Any) -> bool:
    aligned = q.shape[-1] % LANES == 0 and v.shape[-1] % LANES == 0
    enough = min(chunk_size, q.shape[1]) * q.shape[-1] * v.shape[-1] * v.shape[-2] >= FEWEST_PRODUCTS
    return aligned and enough and q.dtype == k.dtype == v.dtype


@implements(portable.adaptive_memory, "cpu", _fits)
def adaptive_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    lag: int,
    state: MemoryState | None = None,
    cache: ValueCache | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, MemoryState]:
    """As megalodon_lm.ops.adaptive_memory.adaptive_memory; for q, k and v of one type."""
    length, where = q.shape[1], boundaries or Boundaries()
    old = empty_state(k, v, chunk_size, lag) if state is None else state
    keys = None if state is None else state.keys.to(k.dtype).contiguous()
    values = None if cache is None else unfinished_values(cache, old.fill, chunk_size).to(v.dtype).contiguous()
    position = old.chunks * chunk_size + old.fill
    since = where.since_start(position, length)
    if where.lengths is not None:
        since = torch.where(where.valid(length), since, -1)
    leaving = where.exit_position(position, length)
    fill, chunks = leaving % chunk_size, leaving // chunk_size

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    memory, log_sum = old.memory.float().contiguous(), old.log_sum.double().contiguous()
    run = form(memory_forward, _forward, q, k, v, keys, values, memory, log_sum)
    out, memory, log_sum, *_ = run(q, k, v, keys, values, memory, log_sum, since, chunks, chunk_size)
    stops = torch.full_like(fill, length) if where.lengths is None else where.lengths
    keys = open_chunk(k, keys, torch.stack([stops, fill, old.fill], 1), chunk_size)
    return out, MemoryState(keys, fill, memory, log_sum, chunks)


# An operator's signature knows only tuples of tensors.
OutputsAndKept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Outputs, memory and log_sum at the exit, and the nine tensors of Kept."""
GradTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The seven tensors of Grads."""


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    memory: Tensor,
    log_sum: Tensor,
    since: Tensor,
    chunks: Tensor,
    chunk_size: int,
) -> OutputsAndKept:
    """memory_products.forward, in one flat tuple."""
    *made, kept = memory_products.forward(q, k, v, keys, values, memory, log_sum, since, chunks, chunk_size)
    return *made, *kept  # type: ignore[return-value]


@torch.library.custom_op("megalodon::memory_forward", mutates_args=())
def memory_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    memory: Tensor,
    log_sum: Tensor,
    since: Tensor,
    chunks: Tensor,
    chunk_size: int,
) -> OutputsAndKept:
    """_forward as an operator."""
    return _forward(q, k, v, keys, values, memory, log_sum, since, chunks, chunk_size)


@memory_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    memory: Tensor,
    log_sum: Tensor,
    since: Tensor,
    chunks: Tensor,
    chunk_size: int,
) -> Any:
    made = (t.new_empty(t.shape) for t in (v, memory, log_sum))
    return *made, *make_kept(q, memory, chunk_size)


@torch.library.custom_op("megalodon::memory_backward", mutates_args=())
def memory_backward(
    grad_out: Tensor | None,
    grad_memory: Tensor | None,
    grad_log_sum: Tensor | None,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    memory: Tensor,
    since: Tensor,
    chunks: Tensor,
    chunk_size: int,
    kept: list[Tensor],
) -> GradTensors:
    """memory_products.backward, as an operator that returns what it fills."""
    saved = Kept(*kept)
    grads = Grads(*_grads(torch.zeros, v, keys, values, memory, saved))
    given = (grad_out, grad_memory, grad_log_sum, grads, v, values, memory, since, chunks, chunk_size, saved)
    memory_products.backward(*given)
    return tuple(grads)  # type: ignore[return-value]


def _grads(
    make: Callable[..., Tensor], v: Tensor, keys: Tensor | None, values: Tensor | None, memory: Tensor, kept: Kept
) -> Iterator[Tensor]:
    """Gradients to be filled, made by torch.zeros or torch.empty."""
    for t in (kept.reading, kept.reading, v, keys, values, memory):
        like = v if t is None else t
        yield make(like.shape if t is not None else 0, dtype=like.dtype, device=like.device)
    yield make(memory.shape[0], *memory.shape[2:4], dtype=torch.float64, device=memory.device)


@memory_backward.register_fake
def _(
    grad_out: Tensor | None,
    grad_memory: Tensor | None,
    grad_log_sum: Tensor | None,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    memory: Tensor,
    since: Tensor,
    chunks: Tensor,
    chunk_size: int,
    kept: list[Tensor],
) -> Any:
    return tuple(_grads(torch.empty, v, keys, values, memory, Kept(*kept)))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, v, keys, values, memory, _, since, chunks, chunk_size = inputs
    ctx.save_for_backward(v, keys, values, memory, since, chunks, *output[3:])
    ctx.chunk_size = chunk_size
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Any, grad_memory: Any, grad_log_sum: Any, *_: Any) -> Any:
    v, keys, values, memory, since, chunks, *kept = ctx.saved_tensors
    grads = [None if g is None else g.contiguous() for g in (grad_out, grad_memory, grad_log_sum)]
    found = list(memory_backward(*grads, v, keys, values, memory, since, chunks, ctx.chunk_size, kept))
    for i, cached in ((3, keys), (4, values)):
        found[i] = found[i] if cached is not None else None
    return *found, None, None, None


memory_forward.register_autograd(_backward, setup_context=_save)
