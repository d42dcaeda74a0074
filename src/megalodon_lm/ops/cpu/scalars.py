"""float32 and bf16 scalars inside compiled loops that LLVM vectorises: conversions, maximum.

NumPy has no bf16: arrays of it travel as uint16.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload


@intrinsic
def _float_of_bits(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _bits_of_float(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def maximum(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger of two float32; either one if one is NaN. Loops over it vectorise, those over `max` do not."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.FloatType(), [ir.FloatType(), ir.FloatType()])
        larger = cgutils.get_or_insert_function(builder.module, function, "llvm.maxnum.f32")
        return builder.call(larger, args, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), codegen


def as_float(element):  # type: ignore[no-untyped-def]
    """An element of a float32 or bf16 array as float32."""
    raise NotImplementedError


@overload(as_float)
def _as_float(element):  # type: ignore[no-untyped-def]
    if isinstance(element, types.Integer):
        return lambda element: _float_of_bits(np.uint32(element) << np.uint32(16))
    return lambda element: element


@njit
def _rounded_bits(value: Any) -> Any:
    """Bits of a float32 of which the upper half is the nearest bf16."""
    bits = _bits_of_float(value)
    if value != value:
        return np.uint32(bits | np.uint32(0x400000))  # rounding would carry into the sign
    return np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))


def rounded(value, array):  # type: ignore[no-untyped-def]
    """A float32 as an element of `array`: bf16 rounds to nearest even."""
    raise NotImplementedError


@overload(rounded)
def _rounded(value, array):  # type: ignore[no-untyped-def]
    if isinstance(array.dtype, types.Integer):

        def nearest_even(value, array):  # type: ignore[no-untyped-def]
            return np.uint16(_rounded_bits(value) >> np.uint32(16))

        return nearest_even
    return lambda value, array: value


def pair(word):  # type: ignore[no-untyped-def]
    """Two adjacent elements, taken as one word of twice the width, as float32; loops over such words vectorise."""
    raise NotImplementedError


@overload(pair)
def _pair(word):  # type: ignore[no-untyped-def]
    low, high = np.uint32(0xFFFF), np.uint32(0xFFFF0000)
    if word.bitwidth == 32:
        return lambda word: (_float_of_bits((word & low) << np.uint32(16)), _float_of_bits(word & high))
    return lambda word: (_float_of_bits(np.uint32(word)), _float_of_bits(np.uint32(word >> np.uint64(32))))


def paired(first, second, array):  # type: ignore[no-untyped-def]
    """Two float32 as one word of `array`, the inverse of `pair`; bf16 rounds as in `rounded`."""
    raise NotImplementedError


@overload(paired)
def _paired(first, second, array):  # type: ignore[no-untyped-def]
    high = np.uint32(0xFFFF0000)
    if array.dtype.bitwidth == 32:
        return lambda first, second, array: (_rounded_bits(first) >> np.uint32(16)) | (_rounded_bits(second) & high)
    return lambda first, second, array: (
        np.uint64(_bits_of_float(first)) | (np.uint64(_bits_of_float(second)) << np.uint64(32))
    )


@njit
def copy(source: Any, target: Any) -> None:
    """Element by element: assigning a whole slice would compile for seconds."""
    for i in range(len(source)):
        target[i] = source[i]
