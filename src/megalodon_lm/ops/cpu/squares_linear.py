"""Linear layers in squares: rows times packed weights, the bias added before sums are rounded; see squares.

Weights are packed once. A thread multiplies strips of 32 rows with a panel of weights, which stays in its second cache
from one strip to the next.
"""

from typing import Any

import torch
from torch import Tensor

from ..derived import derived
from . import squares
from .simd import LANES, as_numpy, compiled, inner, load, store
from .squares import SQUARE, clear, enter_tiles, leave_tiles, multiply, store_sums
from .squares_packing import SQUARE_WORDS, num_strips, pack_transposed, scratch
from .team import num_threads, share

DEEP = 1024  # features of a row from which oneDNN's products fall behind
PANEL_BYTES = 1 << 20  # of weights: half of the second cache of these processors
TASKS_PER_THREAD = 4


def fits(weight: Tensor) -> bool:
    """Whether it goes into tiles: rows of whole squares, and long ones."""
    fan_out, fan_in = weight.shape
    return fan_in >= DEEP and fan_in % SQUARE == fan_out % SQUARE == 0 and squares.available() is not None


@inner
def _pack_strips(first: int, last: int, weight: Any, packed: Any) -> None:
    """One task is 32 features of the result."""
    fan_in = 2 * weight.shape[1]  # two to a word
    for task in range(first, last):
        rows = weight[task * SQUARE : (task + 1) * SQUARE].reshape(-1)
        pack_transposed(rows, fan_in, packed, task * (fan_in // SQUARE) * SQUARE_WORDS, SQUARE_WORDS)


@inner
def _multiply_strips(
    first: int, last: int, tiles: Any, x: Any, packed: Any, bias: Any, out: Any, fan_in: int, width: int
) -> None:
    """One task is a strip of rows and a panel `width` squares wide."""
    fan_out, depth, rows = bias.size, fan_in // SQUARE, x.size // fan_in
    strips = num_strips(rows)
    sums = scratch(SQUARE * SQUARE).view(bias.dtype)
    short = scratch(SQUARE * fan_in // 2).view(x.dtype)  # a strip that ends early, and no matter what after it
    own = enter_tiles(tiles)
    for task in range(first, last):
        panel, row = task // strips, task % strips * SQUARE
        count = min(SQUARE, rows - row)
        if count < SQUARE:
            short[: count * fan_in] = x[row * fan_in :]
        for j in range(panel * width, min((panel + 1) * width, fan_out // SQUARE)):
            clear(own)
            at = j * depth * SQUARE_WORDS
            if count < SQUARE:
                multiply(own, short, 0, fan_in, packed, at, SQUARE_WORDS, depth)
            else:
                multiply(own, x, row * fan_in, fan_in, packed, at, SQUARE_WORDS, depth)
            store_sums(own, sums, 0, SQUARE)
            for r in range(count):
                to = (row + r) * fan_out + j * SQUARE
                for c in range(0, SQUARE, LANES):
                    store(out, to + c, load(sums, r * SQUARE + c) + load(bias, j * SQUARE + c))
    leave_tiles(own)


@compiled
def _pack(threads: int, weight: Any, packed: Any) -> None:
    share(_pack_strips, threads, weight.shape[0] // SQUARE, (weight, packed))


@compiled
def _multiply(
    threads: int, num_tasks: int, tiles: Any, x: Any, packed: Any, bias: Any, out: Any, fan_in: int, width: int
) -> None:
    share(_multiply_strips, threads, num_tasks, (tiles, x, packed, bias, out, fan_in, width))


def packed(weight: Tensor) -> Tensor:
    """A weight that fits, rounded to bf16, as the squares of its transpose, flat."""
    rows = weight.to(torch.bfloat16, memory_format=torch.contiguous_format, copy=True)
    laid_out = rows.new_empty(rows.numel())
    _pack(num_threads(), as_numpy(rows).view("uint32"), as_numpy(laid_out).view("uint32"))
    return laid_out


def _rounded_wide(bias: Tensor) -> Tensor:
    return bias.to(torch.bfloat16).float()


def linear(x: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, without gradients.

    Args:
        x: (..., fan_in), bf16, not empty.
        laid_out: from `packed`.
        bias: (fan_out,), which is rounded to bf16, or None.

    Returns:
        (..., fan_out), bf16; each row bit for bit the same whatever rows are beside it.
    """
    fan_in, threads = x.shape[-1], num_threads()
    fan_out = laid_out.numel() // fan_in
    added = x.new_zeros(fan_out, dtype=torch.float32) if bias is None else derived(_rounded_wide, bias)
    out = x.new_empty(*x.shape[:-1], fan_out)
    strips, columns = -(-x.numel() // fan_in // SQUARE), fan_out // SQUARE
    panels = max(-(-laid_out.numel() * laid_out.itemsize // PANEL_BYTES), -(-TASKS_PER_THREAD * threads // strips))
    width = -(-columns // panels)
    flat = (as_numpy(x.reshape(-1)), as_numpy(laid_out).view("uint32"), as_numpy(added), as_numpy(out).reshape(-1))
    _multiply(threads, strips * -(-columns // width), squares.available(), *flat, fan_in, width)
    return out
