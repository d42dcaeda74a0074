"""Squares of sums by vectors: of bf16 by AVX-512's dot products, where there are no tiles, and of float32; see squares.

A row of A gives one word at a time, a pair of bf16 or one float32, which is multiplied with those of sixteen columns of
B at once. The sums of a block of rows stay in registers for as deep as the product goes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from .emulated_tiles import TILE
from .processor import has_wide_vectors
from .simd import BFloat16, multiply_add

SIDE = 2 * TILE  # of a square
VECTORS = np.zeros(SIDE * SIDE, np.float32)  # stands for such sums where kernels are called
_INT, _WORD = ir.IntType(64), ir.IntType(32)
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), TILE), ir.VectorType(_WORD, TILE)
_PAIRS = ir.VectorType(BFloat16(), 2 * TILE)
_LINE = 64  # bytes of a vector
_ROW = 2 * _LINE  # of a packed square, or of sums
_AT_ONCE = 4  # rows of a square between two looks at how deep the product goes: in float32 sixteen were slower


class _Form(NamedTuple):
    """How products of one type are made, in sums of 32 rows by two vectors."""

    add: Callable[[Any, Any, Any, Any], Any]
    """Emits: sums plus the products of two vectors of words."""
    depth: int
    """Rows of a packed square; as many words has a row of A in each."""
    blocks: tuple[tuple[int, int], ...]
    """Rows whose sums are in registers together, and how many such blocks follow each other."""
    columns: tuple[tuple[int, ...], ...]
    """Vectors of sums that are there together."""


def _add_pairs(builder: Any, sums: Any, left: Any, right: Any) -> Any:
    product = ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
    add = cgutils.get_or_insert_function(builder.module, product, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(add, [sums, builder.bitcast(left, _PAIRS), builder.bitcast(right, _PAIRS)])


def _add_floats(builder: Any, sums: Any, left: Any, right: Any) -> Any:
    return multiply_add(builder, builder.bitcast(left, _FLOATS), builder.bitcast(right, _FLOATS), sums)


def _form(floats: bool) -> _Form:
    """Eight rows by two vectors take half of AVX-512's registers: with more it was slower.

    AVX2 has half as many, which are half as wide.
    """
    whole = ((8, 4),), ((0, 1),)
    if not floats:
        return _Form(_add_pairs, TILE, *whole)
    return _Form(_add_floats, SIDE, *(whole if has_wide_vectors() else (((6, 2), (5, 4)), ((0,), (1,)))))


def _vector(builder: Any, kind: Any, pointer: Any, offset: int) -> Any:
    return builder.bitcast(builder.gep(pointer, [_INT(offset)]), kind.as_pointer())


def _everywhere(builder: Any, word: Any) -> Any:
    nothing = ir.Constant(_WORDS, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, word, _WORD(0)), nothing, ir.Constant(_WORDS, None))


def multiply(
    builder: Any, floats: bool, fresh: bool, sums: Any, a: Any, stride: Any, b: Any, step: Any, squares: Any, rows: Any
) -> None:
    """Emits: 32 x 32 sums become the product of 32 rows, `squares` squares wide, with as many packed squares.

    Args:
        floats: of float32, otherwise of bf16.
        fresh: otherwise the product is added to them.
        sums, a, b: pointers to bytes.
        stride, step: bytes from a row of A, and from a square of B, to the next.
        squares: at least 0.
        rows: how many matter; some after them are left as they are.
    """
    form = _form(floats)
    for columns in form.columns:
        rights = [builder.gep(b, [_INT(column * _LINE)]) for column in columns]
        first = 0
        for size, most in form.blocks:
            wanted = builder.sdiv(builder.add(rows, _INT(size - 1 - first)), _INT(size))  # below 1: none
            blocks = builder.select(builder.icmp_signed("<", wanted, _INT(most)), wanted, _INT(most))
            with cgutils.for_range(builder, blocks) as block:
                row = builder.add(_INT(first), builder.mul(block.index, _INT(size)))
                own = builder.gep(sums, [builder.mul(row, _INT(_ROW))])
                places = [_vector(builder, _FLOATS, own, i * _ROW + c * _LINE) for i in range(size) for c in columns]
                lefts = [builder.gep(a, [builder.mul(builder.add(row, _INT(i)), stride)]) for i in range(size)]
                _multiply_block(builder, form, fresh, places, lefts, rights, step, squares)
            first += size * most


def _multiply_block(
    builder: Any, form: _Form, fresh: bool, places: list[Any], lefts: list[Any], rights: list[Any], step: Any,
    squares: Any,
) -> None:  # fmt: skip
    """Emits: sums at some places become the product of rows, from `lefts` on, with columns, from `rights` on."""
    parts = form.depth // _AT_ONCE
    none = ir.Constant(_FLOATS, [0.0] * TILE)
    before = [none if fresh else builder.load(place, align=4) for place in places]
    count = builder.mul(squares, _INT(parts))
    entry, loop, leave = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", _INT(0), count), loop, leave)

    builder.position_at_end(loop)
    number = builder.phi(_INT)
    number.add_incoming(_INT(0), entry)
    after: list[Any] = [builder.phi(_FLOATS) for _ in places]
    held = list(after)
    along = builder.mul(number, _INT(4 * _AT_ONCE))
    square, part = (divide(number, _INT(parts)) for divide in (builder.udiv, builder.urem))
    down = builder.add(builder.mul(square, step), builder.mul(part, _INT(_AT_ONCE * _ROW)))
    lefts, rights = ([builder.gep(p, [by]) for p in starts] for starts, by in ((lefts, along), (rights, down)))
    for i in range(_AT_ONCE):
        columns = [builder.load(_vector(builder, _WORDS, right, i * _ROW), align=4) for right in rights]
        words = (_everywhere(builder, builder.load(_vector(builder, _WORD, left, 4 * i), align=2)) for left in lefts)
        products = ((word, column) for word in words for column in columns)
        after = [form.add(builder, own, *two) for own, two in zip(after, products, strict=True)]
    following = builder.add(number, _INT(1))
    number.add_incoming(following, loop)
    for phi, start, last in zip(held, before, after, strict=True):
        phi.add_incoming(start, entry)
        phi.add_incoming(last, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, leave)

    builder.position_at_end(leave)
    reached = [builder.phi(_FLOATS) for _ in places]
    for phi, start, last in zip(reached, before, after, strict=True):
        phi.add_incoming(start, entry)
        phi.add_incoming(last, loop)
    for place, phi in zip(places, reached, strict=True):
        builder.store(phi, place, align=4)


def copy(builder: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> None:
    """Emits: 32 rows of 32 float32 from one place to another, with bytes from a row to the next."""
    for row in range(SIDE):
        ends = (
            builder.gep(p, [builder.mul(by, _INT(row))]) for p, by in ((source, source_stride), (target, target_stride))
        )
        one, other = ends
        for half in range(2):
            value = builder.load(_vector(builder, _FLOATS, one, half * _LINE), align=4)
            builder.store(value, _vector(builder, _FLOATS, other, half * _LINE), align=4)
