"""The cache at the exit of a piece, as an operator: rows of the piece and of the entry cache, moved once."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .operators import form
from .scalars import copy
from .simd import as_numpy, compiled, inner
from .team import num_threads, share


def open_chunk(piece: Tensor, cached: Tensor | None, stops: Tensor, fill: Tensor, size: int, entry: Tensor) -> Tensor:
    """As megalodon_lm.ops.open_chunk.open_chunk."""
    run = form(take_open_chunk, _take, piece, cached)
    places = (stops.contiguous(), fill.contiguous(), size, entry.contiguous())
    return run(piece.contiguous(), None if cached is None else cached.contiguous(), *places)


@inner
def _take_rows(first: int, last: int, piece: Any, cached: Any, stops: Any, fill: Any, entry: Any, target: Any) -> None:
    size = target.shape[1]
    for task in range(first, last):
        b, slot = task // size, task % size
        token = stops[b] - fill[b] + slot
        if slot >= fill[b]:
            for i in range(target.shape[2]):
                target[b, slot, i] = 0
        elif token >= 0:
            copy(piece[b, token], target[b, slot])
        else:
            copy(cached[b, entry[b] + token], target[b, slot])


@compiled
def _take_all(threads: int, piece: Any, cached: Any, stops: Any, fill: Any, entry: Any, target: Any) -> None:
    share(_take_rows, threads, target.shape[0] * target.shape[1], (piece, cached, stops, fill, entry, target))


@compiled
def _return_all(grad: Any, stops: Any, fill: Any, entry: Any, piece: Any, cached: Any) -> None:
    """The transpose of _take_all, into zeros."""
    for b in range(len(fill)):
        for slot in range(fill[b]):
            token = stops[b] - fill[b] + slot
            if token >= 0:
                copy(grad[b, slot], piece[b, token])
            else:
                copy(grad[b, slot], cached[b, entry[b] + token])


def _words(t: Tensor) -> np.ndarray:
    """(B, L, H * d); float32 as pairs of 16 bits, so that the same code moves float32 and bf16."""
    words = as_numpy(t).view(np.uint16)
    return words.reshape(*t.shape[:2], t.shape[2] * words.shape[3])  # of no rows too, where -1 would tell nothing


def _take(piece: Tensor, cached: Tensor | None, stops: Tensor, fill: Tensor, size: int, entry: Tensor) -> Tensor:
    target = piece.new_empty(len(piece), size, *piece.shape[2:])
    source = piece if cached is None else cached
    pieces = (_words(piece), _words(source))
    _take_all(num_threads(), *pieces, as_numpy(stops), as_numpy(fill), as_numpy(entry), _words(target))
    return target


@torch.library.custom_op("megalodon::take_open_chunk", mutates_args=())
def take_open_chunk(
    piece: Tensor, cached: Tensor | None, stops: Tensor, fill: Tensor, size: int, entry: Tensor
) -> Tensor:
    """_take as an operator."""
    return _take(piece, cached, stops, fill, size, entry)


@take_open_chunk.register_fake
def _(piece: Tensor, cached: Tensor | None, stops: Tensor, fill: Tensor, size: int, entry: Tensor) -> Tensor:
    return piece.new_empty(piece.shape[0], size, *piece.shape[2:])


@torch.library.custom_op("megalodon::return_open_chunk", mutates_args=())
def return_open_chunk(grad: Tensor, stops: Tensor, fill: Tensor, entry: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Gradients to piece and cache."""
    piece, cached = grad.new_zeros(len(grad), length, *grad.shape[2:]), grad.new_zeros(grad.shape)
    places = (as_numpy(stops), as_numpy(fill), as_numpy(entry))
    _return_all(_words(grad), *places, _words(piece), _words(cached))
    return piece, cached


@return_open_chunk.register_fake
def _(grad: Tensor, stops: Tensor, fill: Tensor, entry: Tensor, length: int) -> Any:
    return grad.new_empty(grad.shape[0], length, *grad.shape[2:]), grad.new_empty(grad.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    piece, cached, stops, fill, _, entry = inputs
    ctx.save_for_backward(stops, fill, entry)
    ctx.length, ctx.cached = piece.shape[1], cached is not None


def _backward(ctx: Any, grad: Tensor) -> Any:
    piece, cached = return_open_chunk(grad.contiguous(), *ctx.saved_tensors, ctx.length)
    return piece, cached if ctx.cached else None, None, None, None, None


take_open_chunk.register_autograd(_backward, setup_context=_save)
