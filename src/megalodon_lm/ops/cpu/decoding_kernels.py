"""One token through one layer, or through the head, as one compiled call without gradients.

What belongs to the model (weights), to the rows (state) and to nobody (scratch) comes in tuples of its own. The state
is changed in place and nothing is allocated. Activations are float32; weights and the attention cache are float32 or
bf16. All arrays are flat, rows first; they may have room for more rows than take the step. Widths are multiples of 16.

Named tuples take Numba three times as long to let in as plain ones, so they come as `plain` makes them, and get their
names back inside, where these cost nothing.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from .decoding_attention import SPLIT, attend, combine, enter_cache, silu
from .elementwise_kernels import gate_forward_on_team, norm_forward_on_team
from .matrix_vector import Matrix, products
from .simd import LANES, add_product, as_numpy, compiled, inner, load, splat, store, sub_product, total
from .team import share
from .timestep_norm_kernels import CUMULATIVE
from .timestep_norm_kernels import forward_on_team as timestep_norm

_FEW = 1 << 14  # operations that are not worth waking another thread for


def plain(part: Any) -> Any:
    """Arrays and numbers in named tuples, as `layer` and `head` take them."""
    return tuple(map(plain, part)) if isinstance(part, tuple) else part


class Sizes(NamedTuple):
    """Widths of a model."""

    model_dim: int
    num_groups: int
    cema_ndim: int
    """States of a channel, filled up to a multiple of 16."""
    num_heads: int
    z_head_dim: int
    value_head_dim: int
    hidden_dim: int
    """Of the feed-forward network."""
    chunk_size: int


class Affine(NamedTuple):
    """What a norm multiplies by, its 1 added, and what it adds: (D,) float32."""

    scale: np.ndarray
    shift: np.ndarray


class Average(NamedTuple):
    """CEMA: p (D, N), q and g (D, 2, N), all real parts of a channel before the imaginary ones, and omega (D,)."""

    p: np.ndarray
    q: np.ndarray
    g: np.ndarray
    omega: np.ndarray


class Heads(NamedTuple):
    """Maps (2, Z) from normalised z to queries and keys, and their rotations (c, Z / H / 2)."""

    scale: np.ndarray
    shift: np.ndarray
    cos: np.ndarray
    sin: np.ndarray


class LayerWeights(NamedTuple):
    """Weights of one block, prepared; named as in its modules."""

    timenorm: Affine
    cema: Average
    rmsnorm: Affine
    wv: Matrix
    wz: Matrix
    wr: Matrix
    wh1: Matrix
    wh2: Matrix
    heads: Heads
    ffn_norm: Affine
    fc1: Matrix
    fc3: Matrix
    """Without a bias where there is no gate."""
    fc2: Matrix
    alpha: np.ndarray
    """(D,) that the feed-forward network is multiplied by."""


class HeadWeights(NamedTuple):
    """Weights of the final norm and of the map to the vocabulary."""

    final_norm: Affine
    output: Matrix


class Statistics(NamedTuple):
    """Of a TimestepNorm: count (B,) int64, mean and variance (B, G) float64; for kernels the memory of them."""

    count: Any
    mean: Any
    var: Any


class LayerRows(NamedTuple):
    """What one block carries for each row: cema (B, D, 2, N) float32, keys and values (B, c, H, d), fill (B,) int64.

    For kernels the memory of them.
    """

    norm: Statistics
    cema: Any
    keys: Any
    values: Any
    fill: Any


class Scratch(NamedTuple):
    """Memory for one step of B rows, of no meaning before or after it."""

    normed: np.ndarray
    mixed: np.ndarray
    v: np.ndarray
    z: np.ndarray
    gate: np.ndarray
    skip: np.ndarray
    queries: np.ndarray
    scores: np.ndarray
    summary: np.ndarray
    partial: np.ndarray
    attention: np.ndarray
    y: np.ndarray
    hidden: np.ndarray
    hidden_gated: np.ndarray
    saved: np.ndarray
    """Where norms leave what a backward pass would need."""
    ones: np.ndarray
    """(B,) int64, tokens of each row in this step."""

    @classmethod
    def make(cls, rows: int, sizes: Sizes) -> "Scratch":
        """For so many rows."""
        d, f = sizes.model_dim, sizes.hidden_dim
        z, v = sizes.num_heads * sizes.z_head_dim, sizes.num_heads * sizes.value_head_dim
        splits = -(-sizes.chunk_size // SPLIT)
        tasks = sizes.num_heads * splits
        widths = (d, d, v, z, v, d, z, tasks * SPLIT, tasks * 2, v * splits, v, d, f, f)
        arrays = (as_numpy(torch.zeros(rows * width)) for width in (*widths, 2))  # PyTorch's begin at a cache line
        return cls(*arrays, np.ones(rows, np.int64))


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


@inner
def _time_norm(
    threads: int, rows: int, sizes: Any, eps: float, x: Any, affine: Any, state: Any, ones: Any, y: Any
) -> None:
    """TimestepNorm of one token a row; what a backward pass would need is not kept."""
    scale, shift = affine
    count, mean, var = state
    for i in range(rows):
        count[i] += 1
    shape, nothing = (1, sizes.model_dim, sizes.num_groups, False), var
    args = (x, shape, scale, shift, eps, CUMULATIVE, mean, var, count, ones, y, mean, var, nothing)
    timestep_norm(threads, rows * sizes.num_groups, args)


@compiled
def layer(threads: int, rows: int, sizes: Any, eps: float, x: Any, weights: Any, state: Any, scratch: Any) -> None:
    """One token a row through one layer.

    Args:
        threads: from team.num_threads().
        rows: B.
        sizes: Sizes.
        eps: of all norms.
        x: (B, D) float32, the residual stream, in and out.
        weights: LayerWeights.
        state: LayerRows.
        scratch: Scratch.
    """
    sizes, weights, state, scratch = Sizes(*sizes), LayerWeights(*weights), LayerRows(*state), Scratch(*scratch)
    dim, ndim, heads, value_dim = sizes.model_dim, sizes.cema_ndim, sizes.num_heads, sizes.value_head_dim
    few = 1 if rows * dim < _FEW else threads
    normed, mixed, y, saved = scratch.normed, scratch.mixed, scratch.y, scratch.saved

    _time_norm(few, rows, sizes, eps, x, weights.timenorm, state.norm, scratch.ones, normed)
    some = 1 if rows * dim * ndim < _FEW else threads
    share(_moving_average, some, rows * dim, (normed, dim, ndim, *weights.cema, state.cema, y))
    norm_forward_on_team(few, rows, (y, dim, *weights.rmsnorm, False, eps, mixed, saved))

    v, z, gate, skip = scratch.v, scratch.z, scratch.gate, scratch.skip
    products(
        threads, rows,
        (normed, weights.wv, v), (mixed, weights.wz, z), (mixed, weights.wr, gate), (mixed, weights.wh1, skip),
    )  # fmt: skip
    queries, keys, values, fill = scratch.queries, state.keys, state.values, state.fill
    shape = (sizes.chunk_size, heads, sizes.z_head_dim, value_dim)
    share(enter_cache, few, rows, (z, v, *weights.heads, shape, eps, fill, queries, keys, values))
    longest = 0
    for i in range(rows):
        longest = max(longest, fill[i])
    splits = longest // SPLIT + 1
    summary, partial, attention = scratch.summary, scratch.partial, scratch.attention
    args = (splits, queries, keys, values, fill, shape, scratch.scores, summary, partial)
    share(attend, threads, rows * splits, args)
    share(combine, few, rows * heads, (splits, heads, value_dim, summary, partial, gate, attention))
    for i in range(rows):
        fill[i] = (fill[i] + 1) % sizes.chunk_size

    idle = (normed, (weights.wh2[0], weights.wh2[1][:0]), y)
    products(threads, rows, (attention, weights.wh2, y), idle, idle, idle)
    _add(x, skip, y, rows * dim)
    norm_forward_on_team(few, rows, (y, dim, *weights.ffn_norm, True, eps, normed, saved))
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
def head(
    threads: int, rows: int, sizes: Any, eps: float, x: Any, weights: Any, state: Any, normed: Any, ones: Any,
    logits: Any,
) -> None:  # fmt: skip
    """The residual stream x (B, D) to logits (B, vocabulary) float32; as `layer`, of HeadWeights and Statistics."""
    sizes, weights = Sizes(*sizes), HeadWeights(*weights)
    matrix, bias = weights.output
    few = 1 if rows * sizes.model_dim < _FEW else threads
    _time_norm(few, rows, sizes, eps, x, weights.final_norm, state, ones, normed)
    idle = (normed, (matrix, bias[:0]), logits)
    products(threads, rows, (normed, (matrix, bias), logits), idle, idle, idle)
