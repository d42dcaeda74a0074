"""Linear layers in squares, and what follows them while sums are at hand; see squares.

Weights are packed once. A thread multiplies strips of 32 rows with a panel of weights, which stays in its second cache
from one strip to the next; bias, activation, gate or residual are applied before sums are rounded.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..derived import derived
from ..linear import Layer
from . import squares
from .simd import LANES, as_numpy, compiled, fetch, inner, load, sigmoid, store
from .squares import SQUARE, enter_tiles, leave_tiles, multiply, store_sums, sums_at_hand
from .squares_packing import empty_words, num_strips, pack_transposed, scratch, square_rows, square_words
from .team import num_threads, share

PANEL_BYTES = 1 << 20  # of weights: half of the second cache of processors with AMX
TASKS_PER_THREAD = 4


def fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether rows go through these weights in squares: without gradients, in whole ones."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.numel():
        return False
    return squares.available(x.dtype) is not None and not any(n % SQUARE for weight in weights for n in weight.shape)


@inner
def _pack_strips(first: int, last: int, weight: Any, packed: Any) -> None:
    """One task is 32 features of the result."""
    fan_in, words = weight.shape[1], square_words(weight)
    for task in range(first, last):
        rows = weight[task * SQUARE : (task + 1) * SQUARE].reshape(-1)
        pack_transposed(rows, fan_in, packed, task * (fan_in // SQUARE) * words, words)


@compiled
def _pack(threads: int, weight: Any, packed: Any) -> None:
    share(_pack_strips, threads, weight.shape[0] // SQUARE, (weight, packed))


@inner
def _multiply_square(own: Any, x: Any, row: int, fan_in: int, short: Any, packed: Any, j: int) -> None:
    """Products of 32 rows and the 32 features from square `j` on; of `short` where x ends before them."""
    depth, words = fan_in // SQUARE, square_words(x)
    at = j * depth * words
    if (row + SQUARE) * fan_in > x.size:
        multiply(own, short, 0, fan_in, packed, at, words, depth, x.size // fan_in - row)
    else:
        multiply(own, x, row * fan_in, fan_in, packed, at, words, depth)


@inner
def _last_rows(x: Any, fan_in: int) -> Any:
    """The strip at the end of x, if that ends early, and no matter what after it."""
    short = scratch(square_rows(x) * fan_in).view(x.dtype)
    rest = x.size % (SQUARE * fan_in)
    short[:rest] = x[x.size - rest :]
    return short


@inner
def _write_strips(
    first: int,
    last: int,
    tiles: Any,
    x: Any,
    fan_in: int,
    packed: Any,
    bias: Any,
    width: int,
    ends: Any,
    silu: bool,
    out: Any,
) -> None:
    """x @ weight.T + bias, or SiLU of it; one task is a strip of rows and a panel `width` squares wide.

    Features between two `ends`, counted in squares, are a result of their own: these follow each other in `out`.
    """
    rows, columns = x.size // fan_in, bias.size // SQUARE
    strips = num_strips(rows)
    room, short, own = scratch(SQUARE * SQUARE).view(bias.dtype), _last_rows(x, fan_in), enter_tiles(tiles)
    for task in range(first, last):
        panel, row = task // strips, task % strips * SQUARE
        part = 0
        for j in range(panel * width, min((panel + 1) * width, columns)):
            while j >= ends[part + 1]:
                part += 1
            fan_out = (ends[part + 1] - ends[part]) * SQUARE
            start = rows * ends[part] * SQUARE + (j - ends[part]) * SQUARE
            _multiply_square(own, x, row, fan_in, short, packed, j)
            sums = sums_at_hand(own, room)
            for r in range(min(SQUARE, rows - row)):
                to = start + (row + r) * fan_out
                for c in range(0, SQUARE, LANES):
                    value = load(sums, r * SQUARE + c) + load(bias, j * SQUARE + c)
                    if silu:
                        value = value * sigmoid(value)
                    store(out, to + c, value)
    leave_tiles(own)


@inner
def _gate_strips(
    first: int, last: int, tiles: Any, x: Any, fan_in: int, packed: Any, bias: Any, width: int, out: Any
) -> None:
    """SiLU of the first half of x @ weight.T + bias times the second; a panel is `width` squares of each half."""
    rows, columns = x.size // fan_in, bias.size // 2 // SQUARE
    fan_out = columns * SQUARE
    strips = num_strips(rows)
    gates, room = scratch(SQUARE * SQUARE).view(bias.dtype), scratch(SQUARE * SQUARE).view(bias.dtype)
    short, own = _last_rows(x, fan_in), enter_tiles(tiles)
    for task in range(first, last):
        panel, row = task // strips, task % strips * SQUARE
        for j in range(panel * width, min((panel + 1) * width, columns)):
            _multiply_square(own, x, row, fan_in, short, packed, j)
            store_sums(own, gates, 0, SQUARE)
            _multiply_square(own, x, row, fan_in, short, packed, columns + j)
            sums = sums_at_hand(own, room)
            for r in range(min(SQUARE, rows - row)):
                to = (row + r) * fan_out + j * SQUARE
                for c in range(0, SQUARE, LANES):
                    gate = load(gates, r * SQUARE + c) + load(bias, j * SQUARE + c)
                    value = load(sums, r * SQUARE + c) + load(bias, fan_out + j * SQUARE + c)
                    store(out, to + c, gate * sigmoid(gate) * value)
    leave_tiles(own)


@inner
def _add_strips(
    first: int,
    last: int,
    tiles: Any,
    x: Any,
    fan_in: int,
    packed: Any,
    bias: Any,
    width: int,
    residual: Any,
    other: Any,
    two: bool,
    out: Any,
) -> None:
    """The residual plus x @ weight.T + bias, plus another branch if there are two."""
    rows, fan_out = x.size // fan_in, bias.size
    strips = num_strips(rows)
    room, short, own = scratch(SQUARE * SQUARE).view(bias.dtype), _last_rows(x, fan_in), enter_tiles(tiles)
    for task in range(first, last):
        panel, row = task // strips, task % strips * SQUARE
        for j in range(panel * width, min((panel + 1) * width, fan_out // SQUARE)):
            for r in range(min(SQUARE, rows - row)):
                to = (row + r) * fan_out + j * SQUARE
                fetch(residual, to)
                fetch(residual, to + LANES)
                if two:
                    fetch(other, to)
            _multiply_square(own, x, row, fan_in, short, packed, j)
            sums = sums_at_hand(own, room)
            for r in range(min(SQUARE, rows - row)):
                to = (row + r) * fan_out + j * SQUARE
                for c in range(0, SQUARE, LANES):
                    value = load(sums, r * SQUARE + c) + load(bias, j * SQUARE + c)
                    if two:
                        value = value + load(other, to + c)
                    store(out, to + c, load(residual, to + c) + value)
    leave_tiles(own)


@compiled
def write_products(threads: int, num_tasks: int, args: Any) -> None:
    """_write_strips for all tasks, as `divide` counts them."""
    share(_write_strips, threads, num_tasks, args)


@compiled
def gate_products(threads: int, num_tasks: int, args: Any) -> None:
    """_gate_strips for all tasks, as `divide` counts them."""
    share(_gate_strips, threads, num_tasks, args)


@compiled
def add_products(threads: int, num_tasks: int, args: Any) -> None:
    """_add_strips for all tasks, as `divide` counts them."""
    share(_add_strips, threads, num_tasks, args)


def _pack_weights(weights: list[Tensor], dtype: torch.dtype) -> np.ndarray:
    """Weights that fit, rounded, as the squares of their transposes, one after the other."""
    per_word = 4 // dtype.itemsize
    packed, done = empty_words(sum(weight.numel() for weight in weights) // per_word), 0
    for weight in weights:
        rows = weight.to(dtype, memory_format=torch.contiguous_format, copy=True)
        words = rows.numel() // per_word
        _pack(num_threads(), as_numpy(rows), packed[done : done + words])
        done += words
    return packed


class Packed(NamedTuple):
    """Layers of one x, as the kernels take them."""

    weights: np.ndarray
    """As words, one layer after the other."""
    biases: np.ndarray
    """As one row, rounded to the type of the weights, float32."""
    ends: np.ndarray
    """The first feature of each layer, and the end of the last one, in squares."""
    widths: list[int]
    """Features of each layer."""


def _lay_out(*given: Any) -> Packed:
    """Weights, and as many biases or none; the last arguments count weights and say what they are rounded to."""
    *tensors, count, dtype = given
    weights, biases = tensors[:count], tensors[count:]
    widths = list(map(len, weights))
    added = [bias.to(dtype).float() for bias in biases] or [torch.zeros(sum(widths))]
    ends = np.array([0, *np.cumsum(widths)]) // SQUARE
    return Packed(_pack_weights(weights, dtype), as_numpy(torch.cat(added)), ends, widths)


def pack_layers(layers: tuple[Layer, ...], dtype: torch.dtype) -> Packed:
    """Layers of one x of some type that fit, kept until they change."""
    weights, biases = zip(*layers, strict=True)
    return derived(_lay_out, *weights, *(() if biases[0] is None else biases), arguments=(len(weights), dtype))


def divide(threads: int, rows: int, weight_bytes: int, columns: int) -> tuple[int, int]:
    """Tasks of a product, and how many squares wide their panels are; `columns` is how wide the results are."""
    strips = -(-rows // SQUARE)
    panels = max(-(-weight_bytes // PANEL_BYTES), -(-TASKS_PER_THREAD * threads // strips))
    width = -(-columns // panels)
    return strips * -(-columns // width), width


def _run(kernel: Any, x: Tensor, packed: Packed, columns: int, *after: Any) -> None:
    """Call a kernel for rows of x; a task of it is a strip of them and some of the columns, counted in squares."""
    fan_in, threads = x.shape[-1], num_threads()
    tasks, width = divide(threads, x.numel() // fan_in, packed.weights.nbytes, columns)
    rows = as_numpy(x.contiguous()).reshape(-1)
    given = squares.available(x.dtype), rows, fan_in, packed.weights, packed.biases, width
    kernel(threads, tasks, (*given, *after))


def linears(x: Tensor, layers: tuple[Layer, ...], silu: bool = False) -> list[Tensor]:
    """x @ weight.T + bias, or SiLU of that, for each layer.

    Args:
        x: (..., fan_in), float32 or bf16, not empty.
        layers: those that fit, with biases all or none; both are rounded to the type of x.
        silu: whether it is applied.

    Returns:
        (..., fan_out) of each, of the type of x; each row bit for bit the same whatever rows are beside it.
    """
    packed, rows = pack_layers(layers, x.dtype), x.shape[:-1]
    if len(layers) == 1:
        out = x.new_empty(*rows, packed.widths[0])
        results, memory = [out], as_numpy(out).reshape(-1)
    else:
        num_rows = rows.numel()
        out = x.new_empty(num_rows * len(packed.biases))
        parts = out.split([num_rows * width for width in packed.widths])
        results = [part.view(*rows, width) for part, width in zip(parts, packed.widths, strict=True)]
        memory = as_numpy(out)
    _run(write_products, x, packed, len(packed.biases) // SQUARE, packed.ends, silu, memory)
    return results


def linear_gate(x: Tensor, layers: tuple[Layer, ...]) -> Tensor:
    """SiLU of the first layer times the second one; see linears."""
    packed = pack_layers(layers, x.dtype)
    out = x.new_empty(*x.shape[:-1], packed.widths[0])
    _run(gate_products, x, packed, packed.widths[0] // SQUARE, as_numpy(out).reshape(-1))
    return out


def linear_add(x: Tensor, layer: Layer, residual: Tensor, other: Tensor | None) -> Tensor:
    """The residual, float32 or bf16, plus the layer, plus `other` of the type of x; see linears."""
    out = residual.new_empty(residual.shape)
    second = x if other is None else other.contiguous()
    added = (as_numpy(t).reshape(-1) for t in (residual.contiguous(), second))
    memory = as_numpy(out).reshape(-1)
    _run(add_products, x, pack_layers((layer,), x.dtype), out.shape[-1] // SQUARE, *added, other is not None, memory)
    return out
