"""Matrix products of bf16 or float32, in squares of 32 x 32 sums, inside compiled kernels.

A kernel takes `tiles`, which says by its type what it is compiled for: AMX for the tile registers of some Intel
processors, VECTORS for registers of sums (vector_squares), EMULATED for plain code that does as AMX anywhere
(emulated_tiles), so that tests need no such processor. `enter_tiles` makes of it what the functions here take. float32
goes with VECTORS alone.

A product is made in squares of 32 x 32 sums in float32, of 32 rows of A, as they lie in memory, and 32 columns of B,
packed: a packed square holds 32 x 32 elements as rows of 32 words. Those of float32 are as they were; of bf16 there are
16 rows, and word (i, j) is the pair B[2 i, j], B[2 i + 1, j]. So transposing the words of a row-major matrix packs its
transpose, and pairing its rows packs the matrix itself. At the shapes of attention this reached 1.5 times the rate of
oneDNN's own products with AMX and 1.3 times with vectors; attention in float32 is 1.3 to 2 times as fast as by
PyTorch's products.

Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, chapter on programming with AMX.
"""

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from . import emulated_tiles, vector_squares
from .emulated_tiles import TILE
from .processor import fuses_floats, has_bf16_vectors, multiplies_tiles
from .simd import inner
from .vector_squares import VECTORS

SQUARE = 32  # rows, columns and depth
_SUMS, _LEFT, _RIGHT = 0, 4, 6  # first tile of each use
_BYTE, _INT = ir.IntType(8), ir.IntType(64)
_POINTER = _BYTE.as_pointer()

AMX = np.zeros(64, np.uint8)  # what ldtilecfg takes: all eight tiles whole
AMX[0] = 1  # palette
AMX[16:32:2] = 64  # bytes of a row
AMX[48:56] = TILE


@functools.cache
def available(dtype: torch.dtype) -> Any:
    """The `tiles` for which kernels of float32 or bf16 are compiled on this processor; None if it has no such way."""
    if dtype == torch.bfloat16:
        return AMX if multiplies_tiles() else VECTORS if has_bf16_vectors() else None
    return VECTORS if dtype == torch.float32 and fuses_floats() else None


def _call(builder: Any, name: str, *operands: Any) -> None:
    function = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.x86.{name}"), operands)


def address_of(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    """Emits a pointer to an element of a flat array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), _POINTER)


class _Instructions:
    """Emits tile instructions, or calls of what stands in for them, as the type of `tiles` says."""

    def __init__(self, context: Any, builder: Any, kind: Any, tiles: Any):
        self.context, self.builder, self.kind, self.tiles = context, builder, kind, tiles
        self.emulated = kind.dtype == types.uint32

    def _emulate(self, function: Any, tiles: tuple[int, ...], kinds: tuple[Any, ...] = (), *operands: Any) -> None:
        signature = types.void(self.kind, *[types.intp] * len(tiles), *kinds)
        values = (self.tiles, *map(_INT, tiles), *operands)
        self.context.compile_internal(self.builder, function, signature, values)

    def zero(self, tile: int) -> None:
        if self.emulated:
            self._emulate(emulated_tiles.zero, (tile,))
        else:
            _call(self.builder, "tilezero", _BYTE(tile))

    def move(self, name: str, tile: int, kind: Any, array: Any, at: Any, stride: Any) -> None:
        """`load` or `store` 16 rows of 64 bytes from element `at`, `stride` elements from one to the next."""
        if self.emulated:
            function = getattr(emulated_tiles, name)
            self._emulate(function, (tile,), (kind, types.intp, types.intp), array, at, stride)
        else:
            instruction = {"load": "tileloadd64", "store": "tilestored64"}[name]
            step = self.builder.mul(stride, _INT(kind.dtype.bitwidth // 8))
            _call(self.builder, instruction, _BYTE(tile), address_of(self.context, self.builder, kind, array, at), step)

    def multiply(self, sums: int, left: int, right: int) -> None:
        if self.emulated:
            self._emulate(emulated_tiles.multiply, (sums, left, right))
        else:
            _call(self.builder, "tdpbf16ps", *map(_BYTE, (sums, left, right)))


def _are_vectors(kind: Any) -> bool:
    """Whether an array of this type stands for sums that vectors add to."""
    return bool(kind.dtype == types.float32)


def _configuration(name: str) -> Any:
    @intrinsic
    def run(typingctx: Any, tiles: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if tiles.dtype == types.uint8:
                _call(builder, name, address_of(context, builder, signature.args[0], args[0], _INT(0)))
            return context.get_dummy_value()

        return types.void(tiles), codegen

    return run


_save_configuration = _configuration("sttilecfg")
_configure = _configuration("ldtilecfg")


@inner
def enter_tiles(tiles: Any) -> Any:
    """Set this thread's tiles up; gives what `leave_tiles` takes to leave them as they were: oneDNN uses them too."""
    own = np.empty_like(tiles)
    _save_configuration(own)
    _configure(tiles)
    return own


@inner
def leave_tiles(own: Any) -> None:
    """Undo `enter_tiles`."""
    _configure(own)


def _move_sums(name: str) -> Any:
    @intrinsic
    def run(typingctx: Any, tiles: Any, c: Any, at: Any, stride: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            tiles, array, at, stride = args
            kind, kind_c = signature.args[:2]
            if _are_vectors(kind):
                own = address_of(context, builder, kind, tiles, _INT(0)), _INT(4 * SQUARE)
                there = address_of(context, builder, kind_c, array, at), builder.mul(stride, _INT(4))
                vector_squares.copy(builder, *((*there, *own) if name == "load" else (*own, *there)))
                return context.get_dummy_value()
            instructions = _Instructions(context, builder, kind, tiles)
            for tile in range(4):
                down, right = builder.mul(stride, _INT(TILE * (tile // 2))), _INT(TILE * (tile % 2))
                start = builder.add(at, builder.add(down, right))
                instructions.move(name, _SUMS + tile, kind_c, array, start, stride)
            return context.get_dummy_value()

        return types.void(tiles, c, types.intp, types.intp), codegen

    return run


# From and to a float32 array, 32 rows of 32, `stride` elements from one to the next.
load_sums = _move_sums("load")
store_sums = _move_sums("store")


def _sums_at_hand(tiles: Any, room: Any) -> Any:
    """What `sums_at_hand` compiles to."""


@overload(_sums_at_hand, inline="always")
def _(tiles: Any, room: Any) -> Any:
    def as_they_lie(tiles: Any, room: Any) -> Any:
        return tiles

    def stored(tiles: Any, room: Any) -> Any:
        store_sums(tiles, room, 0, SQUARE)
        return room

    return as_they_lie if _are_vectors(tiles) else stored


@inner
def sums_at_hand(tiles: Any, room: Any) -> Any:
    """The sums as a float32 array, 32 rows of 32, until the next product: `room` for them, or where they are."""
    return _sums_at_hand(tiles, room)


def _product(fresh: bool) -> Any:
    @intrinsic
    def run(
        typingctx: Any, tiles: Any, a: Any, at: Any, stride: Any, b: Any, b_at: Any, step: Any, squares: Any, rows: Any
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            tiles, a, a_at, stride, b, b_at, step, squares, used = args
            kind, kind_a, _, _, kind_b, *_ = signature.args
            if _are_vectors(kind):
                own = address_of(context, builder, kind, tiles, _INT(0))
                floats, size = kind_a.dtype == types.float32, _INT(kind_a.dtype.bitwidth // 8)
                rows = address_of(context, builder, kind_a, a, a_at), builder.mul(stride, size)
                packed = address_of(context, builder, kind_b, b, b_at), builder.mul(step, _INT(4))
                vector_squares.multiply(builder, floats, fresh, own, *rows, *packed, squares, used)
                return context.get_dummy_value()
            instructions = _Instructions(context, builder, kind, tiles)
            for tile in range(4 if fresh else 0):
                instructions.zero(_SUMS + tile)
            with cgutils.for_range(builder, squares) as depth:
                for half in range(2):
                    row = builder.add(a_at, builder.mul(stride, _INT(TILE * half)))
                    row = builder.add(row, builder.mul(depth.index, _INT(SQUARE)))
                    square = builder.add(b_at, builder.add(builder.mul(depth.index, step), _INT(half * TILE)))
                    instructions.move("load", _LEFT + half, kind_a, a, row, stride)
                    instructions.move("load", _RIGHT + half, kind_b, b, square, _INT(SQUARE))
                for tile in range(4):
                    instructions.multiply(_SUMS + tile, _LEFT + tile // 2, _RIGHT + tile % 2)
            return context.get_dummy_value()

        counts = types.intp, types.intp
        return types.void(tiles, a, *counts, b, *counts, *counts), codegen

    return run


_set_product = _product(True)
_add_product = _product(False)


@inner
def multiply(
    tiles: Any, a: Any, at: int, stride: int, b: Any, b_at: int, step: int, squares: int, rows: int = SQUARE
) -> None:
    """Make the sums the product of 32 rows of A, `squares` squares wide, with as many packed squares of B.

    Args:
        tiles: from `enter_tiles`.
        a: flat float32 or uint16 (bf16) array.
        at, stride: first element, and elements from one row to the next.
        b: flat uint32 array of packed squares.
        b_at, step: first word of the first square, and words from one square to the next.
        squares: how many.
        rows: how many of the sums' matter; the others may be anything.
    """
    _set_product(tiles, a, at, stride, b, b_at, step, squares, rows)


@inner
def add_product(tiles: Any, a: Any, at: int, stride: int, b: Any, b_at: int, step: int, squares: int) -> None:
    """Add such a product to the sums; see multiply."""
    _add_product(tiles, a, at, stride, b, b_at, step, squares, SQUARE)
