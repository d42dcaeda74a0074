"""Rows of a group in and out of the packed squares that are multiplied; see squares.

A group has n queries and, with those before it, m keys, of H heads. Queries, keys and values are taken in
strips of 32, the last one filled with zeros.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .emulated_tiles import TILE
from .simd import LANES, inner, load, splat, store
from .squares import SQUARE, address_of

LINE = 64  # bytes of a cache line: tiles are read fastest from its start


class Result(NamedTuple):
    """What attention gives: (B, L, H, dv), and of a group (H, n) logarithms of the sums of the exponentials."""

    out: Any
    sums: Any


def square_rows(rows):  # type: ignore[no-untyped-def]
    """Rows of 32 words that a packed square has, by the type of an array: 16 of pairs of bf16, or 32 of float32."""
    return SQUARE * rows.itemsize // 4


@overload(square_rows)
def _(rows):  # type: ignore[no-untyped-def]
    count = SQUARE if rows.dtype == types.float32 else TILE
    return lambda rows: count


@inner
def square_words(rows: Any) -> int:
    """32-bit words of a packed square of elements of an array."""
    return SQUARE * square_rows(rows)


@inner
def num_strips(length: int) -> int:
    """Strips of so many rows."""
    return -(-length // SQUARE)


@intrinsic
def store_words(typingctx: Any, b: Any, b_at: Any, rows: Any, upper: Any, lower: Any) -> Any:
    """Pack 16 columns of two rows, which start at `upper` and `lower` of a uint16 array, into 16 words of B.

    Of float32 a column of the upper row is a word.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, b_at, rows, *starts = args
        kind_b, _, kind_rows, _, _ = signature.args
        halves, words = (ir.VectorType(ir.IntType(bits), TILE) for bits in (16, 32))
        target = builder.bitcast(address_of(context, builder, kind_b, b, b_at), words.as_pointer())
        if kind_rows.dtype == types.float32:
            whole = builder.bitcast(address_of(context, builder, kind_rows, rows, starts[0]), words.as_pointer())
            builder.store(builder.load(whole, align=4), target, align=4)
            return context.get_dummy_value()
        addresses = (
            builder.bitcast(address_of(context, builder, kind_rows, rows, at), halves.as_pointer()) for at in starts
        )
        first, second = (builder.zext(builder.load(address, align=2), words) for address in addresses)
        both = builder.or_(first, builder.shl(second, ir.Constant(words, [16] * TILE)))
        builder.store(both, target, align=4)
        return context.get_dummy_value()

    return types.void(b, types.intp, rows, types.intp, types.intp), codegen


def empty_words(count: int) -> np.ndarray:
    """So many 32-bit words from the start of a cache line, where NumPy's own arrays seldom begin."""
    return torch.empty(count, dtype=torch.int32).numpy().view(np.uint32)


@inner
def scratch(words: int) -> Any:
    """An array of so many 32-bit words from the start of a cache line."""
    memory = np.empty(words + LINE // 4, np.uint32)
    skip = (-memory.ctypes.data) % LINE // 4
    return memory[skip : skip + words]


@inner
def pack_transposed(rows: Any, width: int, packed: Any, to: int, step: int) -> None:
    """Pack the transpose of 32 rows of `width` elements: one square for each 32 columns, `step` words apart."""
    words, height = rows.view(np.uint32), square_rows(rows)
    across = width * height // SQUARE
    for i in range(across):
        at = to + i // height * step + i % height * SQUARE
        for j in range(TILE):
            packed[at + j] = words[j * across + i]
        for j in range(TILE):
            packed[at + TILE + j] = words[(j + TILE) * across + i]


@inner
def pack(rows: Any, at: int, stride: int, width: int, packed: Any, to: int, step: int) -> None:
    """Pack 32 rows of `width` elements: one square for each 32 columns, `step` words apart."""
    height = square_rows(rows)
    together = SQUARE // height
    for i in range(height):
        upper = at + i * together * stride
        lower = upper + (together - 1) * stride
        for c in range(0, width, TILE):
            tile = to + c // SQUARE * step + i * SQUARE + c % SQUARE
            store_words(packed, tile, rows, upper + c, lower + c)


@inner
def read_rows(cached: Any, piece: Any, group: Any, h: int, start: int, rows: Any) -> None:
    """Rows start..start + 32 of a head, from the cache (B, n, H, d) at first, then from the piece (B, L, H, d)."""
    row, begin, end, before, entries = group
    width = piece.shape[3]
    for r in range(SQUARE):
        token, to = begin - before + start + r, r * width
        if token < 0:
            for i in range(width):
                rows[to + i] = cached[row, entries + token, h, i]
        elif token < end:
            for i in range(width):
                rows[to + i] = piece[row, token, h, i]
        else:
            for i in range(width):
                rows[to + i] = 0


@inner
def pack_head(
    cached: Any, piece: Any, group: Any, h: int, start: int, rows: Any, packed: Any, to: int, step: int
) -> None:
    """Pack the rows that `read_rows` reads: as they lie, if all are tokens of the piece, or else out of `rows`."""
    token, width = group.begin - group.before + start, piece.shape[3]
    if token >= 0 and token + SQUARE <= group.end:
        stride = piece.shape[2] * width
        at = (group.row * piece.shape[1] + token) * stride + h * width
        pack(piece.reshape(-1), at, stride, width, packed, to, step)
    else:
        read_rows(cached, piece, group, h, start, rows)
        pack(rows, 0, width, width, packed, to, step)


@inner
def write_rows(sums: Any, scale: Any, columns: int, cached: Any, piece: Any, group: Any, h: int, start: int) -> None:
    """Write 32 x 32 sums, scaled by rows, to 32 columns of the rows that `read_rows` reads.

    Those before the group have something already, and are added to.
    """
    row, begin, end, before, entries = group
    for r in range(min(SQUARE, before + end - begin - start)):
        token = begin - before + start + r
        target = cached[row, entries + token, h] if token < 0 else piece[row, token, h]
        for i in range(0, SQUARE, LANES):
            value = load(sums, r * SQUARE + i) * splat(scale[r])
            store(target, columns + i, value + load(target, columns + i) if token < begin else value)
