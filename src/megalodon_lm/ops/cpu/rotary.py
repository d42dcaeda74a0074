"""Rotary positions as an operator: its backward is the rotation by the opposite angle."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rotary import frequencies, rotations
from .operators import form
from .scalars import copy, pair, paired
from .simd import as_numpy, compiled, inner
from .team import num_threads, share

_SIGNS = (np.float32(1), np.float32(-1))


def rotate(x: Tensor, positions: Tensor, base: float, chunk_size: int, heads_without_rope: int = 0) -> Tensor:
    """As megalodon_lm.ops.rotary.rope, for float32 and bf16.

    Args:
        x: (B, L, H, d), d even.
        positions: (B, L) int64; where negative, the result is 0.
        base: of the frequencies.
        chunk_size: so many positions have a table; later ones are a place in it and the start of a chunk, by float64.
        heads_without_rope: as many heads at the end stay as they are.
    """
    heads = x.shape[2] - heads_without_rope
    return form(rotate_pairs, _rotate, x)(x.contiguous(), positions.contiguous(), base, chunk_size, heads, False)


@inner(fastmath={"contract"})
def _turn(x: Any, cos: Any, sin: Any, sign: Any, y: Any) -> None:
    for i in range(len(cos)):
        even, odd = pair(x[i])
        s = sign * sin[i]
        y[i] = paired(even * cos[i] - odd * s, even * s + odd * cos[i], y)


@inner(fastmath={"contract"})
def _compose(cos: Any, sin: Any, start_cos: Any, start_sin: Any, own_cos: Any, own_sin: Any) -> None:
    """cos and sin of the sums of angles."""
    for i in range(len(cos)):
        own_cos[i] = cos[i] * start_cos[i] - sin[i] * start_sin[i]
        own_sin[i] = sin[i] * start_cos[i] + cos[i] * start_sin[i]


@inner(fastmath={"contract"})
def _turn_tokens(
    first: int,
    last: int,
    x: Any,
    positions: Any,
    cos: Any,
    sin: Any,
    frequencies: Any,
    heads: int,
    sign: Any,
    y: Any,
) -> None:
    length, size, pairs = x.shape[1], cos.shape[0], cos.shape[1]
    start_of = 0  # of the chunk whose start the next two are for
    start_cos, start_sin = np.ones(pairs, np.float32), np.zeros(pairs, np.float32)
    own_cos, own_sin = np.empty(pairs, np.float32), np.empty(pairs, np.float32)
    for task in range(first, last):
        b, t = task // length, task % length
        position = positions[b, t]
        if position < 0:
            y[b, t] = 0
            continue
        place = position % size
        start = position - place
        if start != start_of:
            for i in range(pairs):
                start_cos[i], start_sin[i] = np.cos(start * frequencies[i]), np.sin(start * frequencies[i])
            start_of = start
        if start:
            _compose(cos[place], sin[place], start_cos, start_sin, own_cos, own_sin)
        else:
            copy(cos[place], own_cos)
            copy(sin[place], own_sin)
        for h in range(heads):
            _turn(x[b, t, h], own_cos, own_sin, sign, y[b, t, h])
        for h in range(heads, x.shape[2]):
            copy(x[b, t, h], y[b, t, h])


@compiled
def _turn_all(
    threads: int, x: Any, positions: Any, cos: Any, sin: Any, frequencies: Any, heads: int, sign: Any, y: Any
) -> None:
    tasks = x.shape[0] * x.shape[1]
    share(_turn_tokens, threads, tasks, (x, positions, cos, sin, frequencies, heads, sign, y))


def _rotate(x: Tensor, positions: Tensor, base: float, chunk_size: int, heads: int, back: bool) -> Tensor:
    y = x.new_empty(x.shape)
    words = np.uint32 if x.dtype == torch.bfloat16 else np.uint64  # of two elements
    angles = angle_tables(chunk_size, x.shape[-1], base)
    given = (as_numpy(x).view(words), as_numpy(positions), *angles, heads, _SIGNS[back])
    _turn_all(num_threads(), *given, as_numpy(y).view(words))
    return y


@lru_cache(maxsize=16)
def angle_tables(chunk_size: int, dim: int, base: float) -> tuple[np.ndarray, ...]:
    """cos and sin of the places in a chunk (c, dim / 2), and the angles of one step (dim / 2,) in float64."""
    cos, sin = rotations(chunk_size, dim, base, torch.float32, torch.device("cpu"))
    return as_numpy(cos), as_numpy(sin), as_numpy(frequencies(dim, base))


@torch.library.custom_op("megalodon::rotate_pairs", mutates_args=())
def rotate_pairs(x: Tensor, positions: Tensor, base: float, chunk_size: int, heads: int, back: bool) -> Tensor:
    """_rotate as an operator; `back` turns by the opposite angle."""
    return _rotate(x, positions, base, chunk_size, heads, back)


@rotate_pairs.register_fake
def _(x: Tensor, positions: Tensor, base: float, chunk_size: int, heads: int, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, positions, *ctx.choices, ctx.back = inputs
    ctx.save_for_backward(positions)


def _backward(ctx: Any, grad: Tensor) -> Any:
    grad_x = rotate_pairs(grad.contiguous(), *ctx.saved_tensors, *ctx.choices, not ctx.back)
    return grad_x, None, None, None, None, None


rotate_pairs.register_autograd(_backward, setup_context=_save)
