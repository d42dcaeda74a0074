"""One token through one layer, or through the head, as one compiled call without gradients.

What belongs to the model (weights), to the rows (state, places) and to nobody (scratch) comes in tuples of its own; see
decoding_parts. The state is changed in place and nothing is allocated. Activations are float32; weights and the
attention cache are float32 or bf16. Widths are multiples of 16.
"""

from functools import partial
from typing import Any

import numpy as np

from .decoding_attention import SPLIT, attend, combine, enter_cache
from .decoding_memory import enter_memory, recall, strips
from .decoding_parts import Choices, HeadWeights, LayerRows, LayerWeights, Scratch, Sizes
from .elementwise_kernels import gate_forward_on_team, norm_forward_on_team, silu
from .matrix_vector import products
from .simd import LANES, add_product, compiled, inner, load, splat, store, sub_product, total
from .team import share
from .timestep_norm_kernels import forward_on_team as timestep_norm

_FEW = 1 << 14  # operations that are not worth waking another thread for

part = partial(inner, inline="always")  # of an entry, put into its text: compiled with it, and not before for itself


@inner
def _moving_average(
    first: int, last: int, x: Any, dim: int, ndim: int, p: Any, q: Any, g: Any, omega: Any, h: Any, y: Any
) -> None:
    """Channels first..last of (B, D). q, g: (D, 2, N) and h: (B, D, 2, N): all real parts, then all imaginary ones."""
    for task in range(first, last):
        channel = task % dim
        u = x[task]
        source = splat(u)
        sums = splat(np.float32(0))
        for n in range(0, ndim, LANES):
            at, to = 2 * ndim * channel + n, 2 * ndim * task + n
            q_real, q_imag, real, imag = load(q, at), load(q, at + ndim), load(h, to), load(h, to + ndim)
            new = add_product(load(p, ndim * channel + n) * source, q_real, real)
            new = sub_product(new, q_imag, imag)
            imag = add_product(q_real * imag, q_imag, real)
            store(h, to, new)
            store(h, to + ndim, imag)
            sums = sub_product(add_product(sums, load(g, at), new), load(g, at + ndim), imag)
        y[task] = total(sums) + omega[channel] * u


@inner
def _add(a: Any, b: Any, y: Any, size: int) -> None:
    """y += a + b."""
    for i in range(0, size, LANES):
        store(y, i, load(y, i) + (load(a, i) + load(b, i)))


@part
def _time_norm(
    threads: int, rows: int, sizes: Any, choices: Any, x: Any, affine: Any, state: Any, scratch: Any, y: Any
) -> None:
    """A norm over time of one token a row."""
    scale, shift = affine
    count, mean, var = state
    shape = (1, sizes.model_dim, sizes.num_groups)
    statistics = (mean, var, count, scratch.nowhere, scratch.ones, y, mean, var, scratch.moments)
    timestep_norm(threads, rows, (x, shape, scale, shift, choices.eps, choices.decays, *statistics))
    for i in range(rows):
        count[i] += 1


@part
def _average(
    threads: int, few: int, rows: int, sizes: Any, choices: Any, x: Any, weights: Any, state: Any, scratch: Any
) -> None:
    """What stands before attention: norm, moving average, and all that they are multiplied by."""
    dim, ndim, normed, mixed, y = sizes.model_dim, sizes.cema_ndim, scratch.normed, scratch.mixed, scratch.y
    if choices.over_time:
        _time_norm(few, rows, sizes, choices, x, weights.timenorm, state.norm, scratch, normed)
    else:
        norm_forward_on_team(few, rows, (x, dim, *weights.timenorm, True, choices.eps, normed, scratch.saved))
    some = 1 if rows * dim * ndim < _FEW else threads
    share(_moving_average, some, rows * dim, (normed, dim, ndim, *weights.cema, state.cema, y))
    norm_forward_on_team(few, rows, (y, dim, *weights.rmsnorm, False, choices.eps, mixed, scratch.saved))
    products(
        threads, rows,
        (normed, weights.wv, scratch.v), (mixed, weights.wz, scratch.z), (mixed, weights.wr, scratch.gate),
        (mixed, weights.wh1, scratch.skip),
    )  # fmt: skip


@part
def _attend(
    threads: int, few: int, rows: int, sizes: Any, choices: Any, places: Any, weights: Any, state: Any, scratch: Any
) -> None:
    """Attention with its new key and value, times its gate."""
    size, chunks, heads, value_dim = sizes.chunk_size, sizes.num_chunks, sizes.num_heads, sizes.value_head_dim
    queries, keys, values, positions = scratch.queries, state.keys, state.values, places[0]
    shape = (size, chunks, heads, sizes.z_head_dim, value_dim)
    chosen = (choices.eps, choices.normalized, choices.rotary_heads)
    args = (scratch.z, scratch.v, *weights.heads, *places, shape, chosen, queries, keys, values)
    share(enter_cache, few, rows, args)
    longest = 0
    for i in range(rows):
        longest = max(longest, size if chunks > 1 and positions[i] >= size else positions[i] % size + 1)
    splits = -(-longest // SPLIT)
    summary, partial = scratch.summary, scratch.partial
    args = (splits, queries, keys, values, positions, shape, scratch.scores, summary, partial)
    share(attend, threads, rows * chunks * splits, args)
    args = (chunks * splits, heads, value_dim, summary, partial, scratch.gate, scratch.attention)
    share(combine, few, rows * heads, args)


@part
def _remember(
    threads: int, few: int, rows: int, sizes: Any, choices: Any, positions: Any, maps: Any, memory: Any, scratch: Any
) -> None:
    """Add what the memory recalls, and note its new key."""
    keys, matrices = memory
    shape = (sizes.chunk_size, sizes.num_heads, sizes.z_head_dim, sizes.value_head_dim)
    queries = scratch.queries
    args = (scratch.z, *maps, positions, shape, choices.eps, choices.normalized, queries, keys)
    share(enter_memory, few, rows, args)
    tasks = rows * sizes.num_heads * strips(sizes.value_head_dim)
    some = 1 if rows * sizes.num_heads * sizes.z_head_dim * sizes.value_head_dim < _FEW else threads
    share(recall, some, tasks, (queries, matrices, sizes.num_chunks, shape, scratch.attention))


@part
def _join(threads: int, few: int, rows: int, sizes: Any, choices: Any, x: Any, weights: Any, scratch: Any) -> None:
    """Back to the stream, and the feed-forward network."""
    dim, normed, y, saved = sizes.model_dim, scratch.normed, scratch.y, scratch.saved
    idle = (normed, (weights.wh2[0], weights.wh2[1][:0]), y)
    products(threads, rows, (scratch.attention, weights.wh2, y), idle, idle, idle)
    _add(x, scratch.skip, y, rows * dim)
    norm_forward_on_team(few, rows, (y, dim, *weights.ffn_norm, True, choices.eps, normed, saved))
    if not choices.two_hop:
        for i in range(0, rows * dim, LANES):
            store(x, i, load(y, i))
    a, b = scratch.hidden, scratch.hidden_gated
    products(threads, rows, (normed, weights.fc1, a), (normed, weights.fc3, b), idle, idle)
    if len(weights.fc3[1]):
        gate_forward_on_team(few, rows, (sizes.hidden_dim, a, b, a))
    else:
        silu(a, 0, a, 0, rows * sizes.hidden_dim)
    products(threads, rows, (a, weights.fc2, y), idle, idle, idle)
    for i in range(0, rows * dim, LANES):
        store(x, i, add_product(load(x, i), load(weights.alpha, i % dim), load(y, i)))


@compiled
def layer(
    threads: int, rows: int, sizes: Any, choices: Any, x: Any, places: Any, weights: Any, state: Any, scratch: Any
) -> None:
    """One token a row through one layer.

    Args:
        threads: from team.num_threads().
        rows: B.
        sizes: Sizes.
        choices: Choices.
        x: (B, D) float32, the residual stream, in and out.
        places: Places.
        weights: LayerWeights.
        state: LayerRows.
        scratch: Scratch.
    """
    sizes, choices, weights = Sizes(*sizes), Choices(*choices), LayerWeights(*weights)
    state, scratch = LayerRows(*state), Scratch(*scratch)
    few = 1 if rows * sizes.model_dim < _FEW else threads
    _average(threads, few, rows, sizes, choices, x, weights, state, scratch)
    _attend(threads, few, rows, sizes, choices, places, weights, state, scratch)
    _join(threads, few, rows, sizes, choices, x, weights, scratch)


@compiled
def layer_with_memory(
    threads: int, rows: int, sizes: Any, choices: Any, x: Any, places: Any, weights: Any, state: Any, scratch: Any,
    maps: Any, memory: Any,
) -> None:  # fmt: skip
    """As `layer`, with the Heads and the MemoryRows of an adaptive memory."""
    sizes, choices, weights = Sizes(*sizes), Choices(*choices), LayerWeights(*weights)
    state, scratch = LayerRows(*state), Scratch(*scratch)
    few = 1 if rows * sizes.model_dim < _FEW else threads
    _average(threads, few, rows, sizes, choices, x, weights, state, scratch)
    _attend(threads, few, rows, sizes, choices, places, weights, state, scratch)
    _remember(threads, few, rows, sizes, choices, places[0], maps, memory, scratch)
    _join(threads, few, rows, sizes, choices, x, weights, scratch)


@compiled
def head(
    threads: int, rows: int, sizes: Any, choices: Any, x: Any, weights: Any, state: Any, scratch: Any, logits: Any
) -> None:
    """The residual stream x (B, D) to logits (B, vocabulary) float32; as `layer`, of HeadWeights and Statistics."""
    sizes, choices, weights = Sizes(*sizes), Choices(*choices), HeadWeights(*weights)
    scratch = Scratch(*scratch)
    matrix, bias = weights.output
    normed = scratch.normed
    few = 1 if rows * sizes.model_dim < _FEW else threads
    _time_norm(few, rows, sizes, choices, x, weights.final_norm, state, scratch, normed)
    idle = (normed, (matrix, bias[:0]), logits)
    products(threads, rows, (normed, (matrix, bias), logits), idle, idle, idle)
