"""Squares of sums by AVX-512's dot products of bf16, for processors that have those and no tiles; see squares.

A row of A gives one pair of elements at a time, which is multiplied with sixteen columns of B at once. Sums of eight
rows by 32 columns stay in registers for as deep as the product goes.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from .emulated_tiles import TILE
from .simd import BFloat16

SIDE = 2 * TILE  # of a square
VECTORS = np.zeros(SIDE * SIDE, np.float32)  # stands for such sums where kernels are called
_ROWS = 8  # eight by two registers of sums, of 32: more of them were slower
_INT, _WORD = ir.IntType(64), ir.IntType(32)
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), TILE), ir.VectorType(_WORD, TILE)
_PAIRS = ir.VectorType(BFloat16(), 2 * TILE)
_LINE = 64  # bytes of a vector, of 32 elements of A, and of a row of a tile of B
_TILE_BYTES = TILE * _LINE


def _vector(builder: Any, kind: Any, pointer: Any, at: int) -> Any:
    return builder.bitcast(builder.gep(pointer, [_INT(at)]), kind.as_pointer())


def _sum_of(builder: Any, sums: Any, row: int, half: int) -> Any:
    return _vector(builder, _FLOATS, sums, (2 * row + half) * _LINE)


def _add_pairs(builder: Any, sums: list[Any], rows: list[Any], square: Any, pair: int) -> list[Any]:
    """Sums of eight rows by two vectors, with the products of one pair of each row and 32 columns."""
    product = ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
    add = cgutils.get_or_insert_function(builder.module, product, "llvm.x86.avx512bf16.dpbf16ps.512")
    nothing, first = ir.Constant(_WORDS, ir.Undefined), ir.Constant(_WORDS, [0] * TILE)
    columns = [
        builder.bitcast(
            builder.load(_vector(builder, _WORDS, square, half * _TILE_BYTES + pair * _LINE), align=4), _PAIRS
        )
        for half in range(2)
    ]
    added = []
    for i, row in enumerate(rows):
        word = builder.load(_vector(builder, _WORD, row, pair * 4), align=2)
        everywhere = builder.shuffle_vector(builder.insert_element(nothing, word, _WORD(0)), nothing, first)
        left = builder.bitcast(everywhere, _PAIRS)
        added += [builder.call(add, [sums[2 * i + half], left, columns[half]]) for half in range(2)]
    return added


def multiply(
    builder: Any, fresh: bool, sums: Any, a: Any, stride: Any, b: Any, step: Any, squares: Any, rows: Any
) -> None:
    """Emits: 32 x 32 sums become the product of 32 rows, `squares` squares wide, with as many packed squares.

    Args:
        fresh: otherwise the product is added to them.
        sums, a, b: pointers to bytes.
        stride, step: bytes from a row of A, and from a square of B, to the next.
        squares: at least 0.
        rows: how many matter; some after them are left as they are.
    """
    blocks = builder.sdiv(builder.add(rows, _INT(_ROWS - 1)), _INT(_ROWS))
    with cgutils.for_range(builder, blocks) as block:
        row = builder.mul(block.index, _INT(_ROWS))
        own = builder.gep(sums, [builder.mul(row, _INT(2 * _LINE))])
        start = builder.gep(a, [builder.mul(row, stride)])
        places = [_sum_of(builder, own, i, half) for i in range(_ROWS) for half in range(2)]
        none = ir.Constant(_FLOATS, [0.0] * TILE)
        before = [none if fresh else builder.load(place, align=4) for place in places]
        entry, loop, leave = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.cbranch(builder.icmp_signed("<", _INT(0), squares), loop, leave)

        builder.position_at_end(loop)
        number = builder.phi(_INT)
        number.add_incoming(_INT(0), entry)
        held = [builder.phi(_FLOATS) for _ in places]
        left = builder.gep(start, [builder.mul(number, _INT(_LINE))])
        rows = [builder.gep(left, [builder.mul(stride, _INT(i))]) for i in range(_ROWS)]
        square, after = builder.gep(b, [builder.mul(number, step)]), list(held)
        for pair in range(TILE):
            after = _add_pairs(builder, after, rows, square, pair)
        following = builder.add(number, _INT(1))
        number.add_incoming(following, loop)
        for phi, first, last in zip(held, before, after, strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(last, loop)
        builder.cbranch(builder.icmp_signed("<", following, squares), loop, leave)

        builder.position_at_end(leave)
        reached = [builder.phi(_FLOATS) for _ in places]
        for place, phi, first, last in zip(places, reached, before, after, strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(last, loop)
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
