"""The cache at the exit of a piece, as an operator: rows of the piece and of the entry cache, moved once."""

import math
import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .operators import form
from .scalars import copy
from .simd import as_numpy, compiled, inner
from .team import num_threads, share

# Not those of a fork; where there is no fork, nothing has to be said.
_OWN_PAGES: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def open_chunk(piece: Tensor, cached: Tensor | None, places: Tensor, size: int) -> Tensor:
    """As megalodon_lm.ops.open_chunk.open_chunk; `places` are (B, 3): its `stops`, `fill` and `entry`."""
    run = form(take_open_chunk, _take, piece, cached)
    return run(piece.contiguous(), None if cached is None else cached.contiguous(), places, size)


@inner
def _take_rows(first: int, last: int, piece: Any, cached: Any, places: Any, target: Any) -> None:
    """Into zeros."""
    size = target.shape[1]
    for task in range(first, last):
        b, slot = task // size, task % size
        stop, fill, entry = places[b, 0], places[b, 1], places[b, 2]
        token = stop - fill + slot
        if slot >= fill:
            continue
        if token >= 0:
            copy(piece[b, token], target[b, slot])
        else:
            copy(cached[b, entry + token], target[b, slot])


@compiled
def take_all(threads: int, piece: Any, cached: Any, places: Any, target: Any) -> None:
    """open_chunk of (B, L, n) and (B, size, n) into zeros (B, size, n)."""
    share(_take_rows, threads, target.shape[0] * target.shape[1], (piece, cached, places, target))


@compiled
def _return_all(grad: Any, places: Any, piece: Any, cached: Any) -> None:
    """The transpose of take_all, into zeros."""
    for b in range(len(places)):
        stop, fill, entry = places[b, 0], places[b, 1], places[b, 2]
        for slot in range(fill):
            token = stop - fill + slot
            if token >= 0:
                copy(grad[b, slot], piece[b, token])
            else:
                copy(grad[b, slot], cached[b, entry + token])


def _words(t: Tensor) -> np.ndarray:
    """(B, L, H * d); float32 as pairs of 16 bits, so that the same code moves float32 and bf16."""
    words = as_numpy(t).view(np.uint16)
    return words.reshape(*t.shape[:2], t.shape[2] * words.shape[3])  # of no rows too, where -1 would tell nothing


def _take(piece: Tensor, cached: Tensor | None, places: Tensor, size: int) -> Tensor:
    shape = len(piece), size, *piece.shape[2:]
    source, target = piece if cached is None else cached, zeros(shape, piece.dtype, int(places[:, 1].sum()))
    take_all(num_threads(), _words(piece), _words(source), as_numpy(places), _words(target))
    return target


def zeros(shape: tuple[int, ...], dtype: torch.dtype, used: int) -> Tensor:
    """A cache, of which so many entries of all rows will be written: it may be far larger than what it holds.

    Pages that nobody has touched cost nothing where little is held, and more than memory written with zeros where they
    are used. NumPy's zeros are such pages too, unless freed memory is kept.
    """
    size = math.prod(shape) * dtype.itemsize
    if used < shape[0] * shape[1] // 8 and size >= mmap.PAGESIZE:
        return torch.frombuffer(mmap.mmap(-1, size, **_OWN_PAGES), dtype=dtype).view(shape)
    return torch.from_numpy(np.zeros(shape, f"u{dtype.itemsize}")).view(dtype)


@torch.library.custom_op("megalodon::take_open_chunk", mutates_args=())
def take_open_chunk(piece: Tensor, cached: Tensor | None, places: Tensor, size: int) -> Tensor:
    """_take as an operator."""
    return _take(piece, cached, places, size)


@take_open_chunk.register_fake
def _(piece: Tensor, cached: Tensor | None, places: Tensor, size: int) -> Tensor:
    return piece.new_empty(piece.shape[0], size, *piece.shape[2:])


@torch.library.custom_op("megalodon::return_open_chunk", mutates_args=())
def return_open_chunk(grad: Tensor, places: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Gradients to piece and cache."""
    piece, cached = grad.new_zeros(len(grad), length, *grad.shape[2:]), grad.new_zeros(grad.shape)
    _return_all(_words(grad), as_numpy(places), _words(piece), _words(cached))
    return piece, cached


@return_open_chunk.register_fake
def _(grad: Tensor, places: Tensor, length: int) -> Any:
    return grad.new_empty(grad.shape[0], length, *grad.shape[2:]), grad.new_empty(grad.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    piece, cached, places, _ = inputs
    ctx.save_for_backward(places)
    ctx.length, ctx.cached = piece.shape[1], cached is not None


def _backward(ctx: Any, grad: Tensor) -> Any:
    piece, cached = return_open_chunk(grad.contiguous(), *ctx.saved_tensors, ctx.length)
    return piece, cached if ctx.cached else None, None, None


take_open_chunk.register_autograd(_backward, setup_context=_save)
