"""A block that reads as one compiled call, of the kernels that its ops call one by one.

Between two products the interpreter would find its own code gone from the caches: a call of an op takes 0.2 ms there,
all calls of a prompt of 1K a tenth of its time.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .attention_kernels import plan_groups
from .attention_operands import Group, Operands
from .causal_attention import MERGED_KEYS
from .cema_kernels import forward as average_channels
from .elementwise_kernels import TASK, gate_forward_on_team, mean_square, norm_forward_on_team
from .finite import all_finite
from .open_chunk import take_all
from .own_code import Calls
from .scalars import paired
from .simd import LANES, compiled, inner, load, splat, store
from .squares import SQUARE
from .squares_forward import Packed, attend
from .squares_linear import add_products, divide, gate_products, write_products
from .squares_packing import LINE, Result
from .strips import CHANNELS, TOKENS, plan_strips
from .team import share
from .timestep_norm_kernels import forward_on_team as norm_over_time

part = partial(inner, inline="always")  # of an entry, put into its text: no reference is counted

_divide = inner(divide)


class Shape(NamedTuple):
    """Of a piece and a block."""

    batch: int
    length: int
    dim: int
    groups: int
    ndim: int
    heads: int
    z_head_dim: int
    value_head_dim: int
    hidden: int
    chunk_size: int
    turning: int
    """Heads of queries and keys that are rotated."""


class Weights(NamedTuple):
    """Prepared: norms as scale and shift, layers as squares_linear packs them, (weights, biases, ends)."""

    timenorm: Any
    cema: Any
    """Coefficients as of cema_kernels, and omega."""
    rmsnorm: Any
    heads: Any
    """Scale and shift (2, Z) of queries, then of keys."""
    mixed: Any
    """wz, wr and wh1."""
    wv: Any
    wh2: Any
    norm: Any
    opening: Any
    """fc1, and fc3 where there is a gate."""
    fc2: Any
    angles: Any
    """cos and sin (c, z_head_dim / 2)."""


class Carried(NamedTuple):
    """State at the entry, or at the exit, of which count and fill are known beforehand and the rest is written.

    Flat statistics and CEMA's; keys and values (B, n, H, d), n = 0 for none at the entry and zeros at the exit.
    """

    count: Any
    mean: Any
    var: Any
    cema: Any
    keys: Any
    values: Any
    fill: Any


class Scratch(NamedTuple):
    """Memory of no meaning before or after a call, of the type of products where nothing else is said.

    bf16 is 16 bits; what is turned or packed is words, of two elements or of 32 bits. All of these have LINE bytes more
    than is said, so that what is used begins at a cache line.
    """

    tn: Any
    """(B, L, D): what the norm over time gives, and later the second norm."""
    mx: Any
    """(B, L, D): the average, then normalised."""
    made: Any
    """z, gate and skipping branch, one after the other."""
    v: Any
    attention: Any
    hidden: Any
    q: Any
    k: Any
    packed_keys: Any
    packed_values: Any
    y: Any
    """(B, L, D) float32."""
    saved: Any
    """(B, L, 2) float32, where norms leave what a backward pass would need."""
    sums: Any
    """Of scores: (H, n) float32 for the queries of a group."""
    moments: Any
    """The same of the norm over time: (B, L, 3, G) float64."""
    slots: Any
    """(B, L) int64, how many tokens before it a token sees."""
    plan: Any
    """Of the average: (B, 2 M + 3) int64 for M strips a row."""
    places: Any
    """(B, 3) int64."""
    groups: Any
    """(B L, 5) int64."""
    ends: Any
    """(B, n + L) int64."""
    nowhere: Any
    """(B, 0) bool: no document begins."""
    nothing: Any
    """(0,) float32: no state is kept."""

    @classmethod
    def make(cls, shape: Shape, entries: int, kind: type) -> "Scratch":
        """For a piece, so many entries of the cache at its entry, and products of float32 or of uint16 (bf16)."""
        size = np.dtype(kind).itemsize
        s, rows = shape, shape.batch * shape.length
        z, v = s.heads * s.z_head_dim, s.heads * s.value_head_dim
        keys = -(-min(s.length + entries, max(s.chunk_size, MERGED_KEYS)) // SQUARE) * SQUARE
        made = (np.empty(rows * n + LINE // size, kind) for n in (s.dim, s.dim, z + v + s.dim, v, v, s.hidden))
        turned = (np.empty(rows * z // 2 + LINE // size // 2, f"u{2 * size}") for _ in range(2))
        packed = (np.empty(keys * n * size // 4 + LINE // 4, np.uint32) for n in (z, v))
        floats = (np.empty(n, np.float32) for n in (rows * s.dim, rows * 2, keys * s.heads))
        strips = -(-s.length // TOKENS)
        whole = (rows, s.batch * (2 * strips + 3), s.batch * 3, rows * 5, s.batch * (entries + s.length))
        integers = (np.empty(n, np.int64) for n in whole)
        nothing = np.empty((s.batch, 0), np.bool_), np.empty(0, np.float32)
        return cls(*made, *turned, *packed, *floats, np.empty(rows * 3 * s.groups), *integers, *nothing)


@inner(fastmath={"contract"})
def _turn(row: Any, cos: Any, sin: Any, at: int, y: Any, to: int) -> None:
    """Pairs of a float32 row, turned by angles from `at` of the tables, into words of y."""
    for i in range(len(row) // 2):
        even, odd, c, s = row[2 * i], row[2 * i + 1], cos[at + i], sin[at + i]
        y[to + i] = paired(even * c - odd * s, even * s + odd * c, y)


@inner
def _make_queries(
    first: int, last: int, z: Any, shape: Any, eps: float, scale: Any, shift: Any, slots: Any, cos: Any, sin: Any,
    q: Any, k: Any,
) -> None:  # fmt: skip
    """Tokens first..last: z of each head normalised, mapped to queries and keys, and turned; these as words."""
    heads, width, turning = shape
    row, still, zero = np.empty(width, np.float32), np.empty(width // 2, np.float32), np.zeros(width // 2, np.float32)
    for i in range(width // 2):
        still[i] = 1
    for task in range(first, last):
        for h in range(heads):
            at = (task * heads + h) * width
            by = splat(np.float32(1 / np.sqrt(mean_square(z, at, width, np.float32(0)) + np.float32(eps))))
            for view in range(2):
                own = (view * heads + h) * width
                for i in range(0, width, LANES):
                    store(row, i, load(z, at + i) * by * load(scale, own + i) + load(shift, own + i))
                target = q if view == 0 else k
                if h < turning:
                    _turn(row, cos, sin, slots[task] * (width // 2), target, at // 2)
                else:
                    _turn(row, still, zero, 0, target, at // 2)


@compiled
def _make_queries_on_team(threads: int, num_tasks: int, args: Any) -> None:
    share(_make_queries, threads, num_tasks, args)


@part
def _aligned(memory: Any, size: int) -> Any:
    """So many elements from the start of a cache line."""
    skip = (-memory.ctypes.data) % LINE // memory.itemsize
    return memory[skip : skip + size]


@part
def _find_average(
    threads: int, shape: Any, eps: float, decays: Any, x: Any, w: Any, entry: Any, leaving: Any, scratch: Any,
    tn: Any, mx: Any,
) -> None:  # fmt: skip
    """The norm over time of x, and the normalised moving average of that."""
    batch, length, dim, rows = shape.batch, shape.length, shape.dim, shape.batch * shape.length
    strips = -(-length // TOKENS)
    edges, slots = scratch.plan[: batch * (strips + 1)], scratch.plan[batch * (strips + 1) : batch * (2 * strips + 1)]
    counts, lengths = scratch.plan[-2 * batch : -batch], scratch.plan[-batch:]
    for b in range(batch):
        lengths[b] = length
    statistics = (entry.mean, entry.var, entry.count, scratch.nowhere.reshape(-1), lengths, tn, leaving.mean)
    of_norm = (x, (length, dim, shape.groups), *w.timenorm, eps, decays, *statistics, leaving.var, scratch.moments)
    norm_over_time(threads, rows, of_norm)

    edges, slots = edges.reshape((batch, strips + 1)), slots.reshape((batch, strips))
    plan_strips(scratch.nowhere, lengths, edges, slots, counts)
    coefficients, omega = w.cema
    of_average = (
        tn, (length, dim, shape.ndim, np.int64(0)), coefficients, omega, entry.cema, edges, slots, counts, mx,
        leaving.cema, scratch.nothing,
    )  # fmt: skip
    average_channels(threads, batch * (len(omega) // CHANNELS), of_average)
    norm_forward_on_team(threads, rows, (mx, dim, *w.rmsnorm, False, eps, mx, scratch.saved))


@part
def _write(threads: int, tiles: Any, x: Any, fan_in: int, layers: Any, silu: bool, out: Any) -> None:
    """Layers of x, or SiLU of them, one after the other."""
    weights, biases, ends = layers
    tasks, width = _divide(threads, x.size // fan_in, weights.size * 4, ends[-1])
    write_products(threads, tasks, (tiles, x, fan_in, weights, biases, width, ends, silu, out))


@part
def _add(
    threads: int, tiles: Any, x: Any, fan_in: int, layer: Any, residual: Any, other: Any, two: bool, out: Any
) -> None:
    """The residual plus a layer, and another branch if there are two."""
    weights, biases, ends = layer
    tasks, width = _divide(threads, x.size // fan_in, weights.size * 4, ends[-1])
    add_products(threads, tasks, (tiles, x, fan_in, weights, biases, width, residual, other, two, out))


@part
def _leave(threads: int, shape: Any, piece: Any, width: int, cached: Any, places: Any, target: Any) -> None:
    """Keys or values of the unfinished chunk."""
    rows = piece.reshape((shape.batch, shape.length, width))
    old = cached.reshape((shape.batch, cached.shape[1], width))
    take_all(threads, rows, old, places, target.reshape((shape.batch, shape.chunk_size, width)))


@part
def _attend(
    threads: int, tiles: Any, shape: Any, exponents: Any, q: Any, k: Any, v: Any, entry: Any, leaving: Any,
    scratch: Any, out: Any,
) -> bool:  # fmt: skip
    """Attention of each chunk, and what is left of the last one; whether all of it is finite."""
    batch, length, heads, dk, dv = shape.batch, shape.length, shape.heads, shape.z_head_dim, shape.value_head_dim
    places = scratch.places.reshape((batch, 3))
    for b in range(batch):
        places[b, 0], places[b, 1], places[b, 2] = length, leaving.fill[b], entry.fill[b]
    _leave(threads, shape, k, heads * dk, entry.keys, places, leaving.keys)
    _leave(threads, shape, v, heads * dv, entry.values, places, leaving.values)

    slots = scratch.slots.reshape((batch, length))
    groups, ends = scratch.groups.reshape((batch * length, 5)), scratch.ends.reshape((batch, -1))
    count = plan_groups(slots, np.int64(MERGED_KEYS), ends, groups)
    out4 = out.reshape((batch, length, heads, dv))
    given = Operands(
        q.reshape((batch, length, heads, dk)), k.reshape((batch, length, heads, dk)),
        v.reshape((batch, length, heads, dv)), entry.keys, entry.values,
    )  # fmt: skip
    keys, values = scratch.packed_keys, scratch.packed_values
    packed = Packed(_aligned(keys, keys.size - LINE // 4), _aligned(values, values.size - LINE // 4))
    for i in range(count):
        row, begin, end = groups[i, 0], groups[i, 1], groups[i, 2]
        group = Group(row, begin, end, groups[i, 3], groups[i, 4])
        sums = scratch.sums[: heads * (end - begin)].reshape((heads, end - begin))
        own = scratch.slots[row * length + begin : row * length + end]
        attend(threads, tiles, given, group, own, packed, Result(out4, sums))
    return all_finite(out.view(np.uint64).reshape((batch, length, -1)), *exponents, slots)


@compiled(pipeline_class=Calls)
def read(
    threads: int, tiles: Any, shape: Any, eps: float, decays: Any, exponents: Any, two_hop: bool, x: Any, weights: Any,
    entry: Any, leaving: Any, scratch: Any, out: Any,
) -> bool:  # fmt: skip
    """A piece through a block; whether attention was finite, without which `out` is nothing.

    Args:
        threads: from num_threads().
        tiles: AMX, VECTORS or EMULATED.
        shape: Shape; z_head_dim, value_head_dim and all widths multiples of 32.
        eps: of all norms.
        decays: of the norm over time; see timestep_norm_kernels.
        exponents: of the type of products; see finite.
        two_hop: whether the feed-forward network adds to the input of the block, and not to its own.
        x: (B, L, D) float32, flat, as is `out`.
        weights: Weights.
        entry: Carried.
        leaving: Carried, out but for count and fill.
        scratch: Scratch.
        out: (B, L, D) float32, out.
    """
    shape, w, entry, leaving = Shape(*shape), Weights(*weights), Carried(*entry), Carried(*leaving)
    scratch = Scratch(*scratch)
    rows, dim, hidden, heads = shape.batch * shape.length, shape.dim, shape.hidden, shape.heads
    z_dim, value_dim = heads * shape.z_head_dim, heads * shape.value_head_dim
    for i in range(rows):
        scratch.slots[i] = (entry.fill[i // shape.length] + i % shape.length) % shape.chunk_size

    tn, mx = _aligned(scratch.tn, rows * dim), _aligned(scratch.mx, rows * dim)
    _find_average(threads, shape, eps, decays, x, w, entry, leaving, scratch, tn, mx)
    made, v = _aligned(scratch.made, rows * (z_dim + value_dim + dim)), _aligned(scratch.v, rows * value_dim)
    _write(threads, tiles, mx, dim, w.mixed, np.bool_(False), made)
    z, r, skipping = made[: rows * z_dim], made[rows * z_dim : rows * (z_dim + value_dim)], made[-rows * dim :]
    _write(threads, tiles, tn, dim, w.wv, np.bool_(True), v)
    q, k = _aligned(scratch.q, rows * z_dim // 2), _aligned(scratch.k, rows * z_dim // 2)
    turned = (heads, shape.z_head_dim, shape.turning)
    _make_queries_on_team(threads, rows, (z, turned, eps, *w.heads, scratch.slots, *w.angles, q, k))
    attention, y = _aligned(scratch.attention, rows * value_dim), scratch.y
    q, k = q.view(z.dtype), k.view(z.dtype)
    if not _attend(threads, tiles, shape, exponents, q, k, v, entry, leaving, scratch, attention):
        return False
    gate_forward_on_team(threads, -(-rows * value_dim // TASK), (np.int64(TASK), r, attention, attention))
    _add(threads, tiles, attention, value_dim, w.wh2, x, skipping, np.bool_(True), y)

    inside = _aligned(scratch.hidden, rows * hidden)
    norm_forward_on_team(threads, rows, (y, dim, *w.norm, True, eps, tn, scratch.saved))
    layers, biases, ends = w.opening
    if len(ends) > 2:
        tasks, width = _divide(threads, rows, layers.size * 4, ends[1])
        gate_products(threads, tasks, (tiles, tn, dim, layers, biases, width, inside))
    else:
        _write(threads, tiles, tn, dim, w.opening, np.bool_(True), inside)
    _add(threads, tiles, inside, hidden, w.fc2, x if two_hop else y, tn, np.bool_(False), out)
    return True
