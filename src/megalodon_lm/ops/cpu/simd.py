"""Sixteen floats as one value inside compiled kernels.

Numba leaves vectorising to LLVM, which gives up on loops with several arrays and a recurrence. A value of the type
`float32x16` is one register (or a few narrower ones, where the processor has no wider), stays there across a loop, and
its products and sums fuse. bf16 arrays travel as uint16, since NumPy has no such type; `load` and `store` convert.
"""

import operator
import textwrap
from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.core.typing.templates import signature as typing_signature
from numba.extending import intrinsic, lower_builtin, models, register_model
from torch import Tensor

from ..backend import KernelError
from .kernel_cache import keep
from .own_code import OwnCode
from .processor import has_bf16_vectors, has_wide_vectors

LANES = 16
_FLAGS = ("contract", "reassoc", "nsz", "arcp")
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}


def _compile(function: Any = None, **options: Any) -> Any:
    if function is None:
        return partial(_compile, **options)
    return keep(njit(**options)(function))


def _compile_entry(function: Any = None, **options: Any) -> Any:
    if function is None:
        return partial(_compile_entry, **options)
    dispatcher = _compile(function, **options)
    attempt = dispatcher.compile

    def compile_or_say(signature: Any) -> Any:
        try:
            return attempt(signature)
        except Exception as error:
            why = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
            name = f"{function.__module__}.{function.__name__}"
            raise KernelError(f"{name} cannot be compiled, MEGALODON_BACKEND=portable avoids it: {why}") from error

    dispatcher.compile = compile_or_say
    return dispatcher


# Decorators, to which options of Numba can be added. Both compile for use outside the interpreter lock and keep the
# result on disk. `compiled` functions are called from Python, and raise KernelError if they cannot be compiled; they
# allocate nothing, so that arrays need no reference counts. `inner` ones are called by compiled code alone, which
# spares the entry from Python.
compiled: Any = partial(_compile_entry, **_OPTIONS, _nrt=False, pipeline_class=OwnCode)
inner: Any = partial(_compile, **_OPTIONS, _nrt=True, no_cpython_wrapper=True)


class Float32x16(types.Type):
    """The type of a vector."""

    def __init__(self) -> None:
        super().__init__("float32x16")


float32x16 = Float32x16()


@register_model(Float32x16)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def as_numpy(t: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor; bf16 as uint16. Of any other it would be a copy, and lost.

    That memory can then no longer be freed before the tensor is, as FSDP2 does with parameters: give copies of those.
    """
    assert t.is_contiguous(), t.stride()
    t = t.detach() if t.requires_grad else t
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


def _words(value: int) -> ir.Constant:
    return ir.Constant(_WORDS, [value] * LANES)


@intrinsic
def load(typingctx: Any, array: Any, offset: Any) -> Any:
    """Sixteen elements of a contiguous float32 or uint16 (bf16) array from `offset`; nothing is checked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        data = context.make_array(kind)(context, builder, args[0]).data
        pointer = builder.gep(data, [args[1]])
        if isinstance(kind.dtype, types.Float):
            return builder.load(builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)
        halves = builder.load(builder.bitcast(pointer, _HALVES.as_pointer()), align=2)
        return _widened(builder, halves)

    return float32x16(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write sixteen elements from `offset`, rounded to nearest even for bf16; nothing is checked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        data = context.make_array(kind)(context, builder, args[0]).data
        pointer = builder.gep(data, [args[1]])
        if isinstance(kind.dtype, types.Float):
            builder.store(args[2], builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)
        else:
            round_to_bf16 = _round_by_instruction if has_bf16_vectors() else _round_bits
            builder.store(round_to_bf16(builder, args[2]), builder.bitcast(pointer, _HALVES.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, float32x16), codegen


@intrinsic
def fetch(typingctx: Any, array: Any, offset: Any) -> Any:
    """Ask for the line of an element to come into the second cache; there need be no such element."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [pointer, word(0), word(2), word(1)])  # to read, to be kept, data
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def exact_sum(typingctx: Any, array: Any, a: Any, b: Any) -> Any:
    """a + b as tensors of the array's type are added: to nearest, not in another order, rounded if that is bf16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        added = builder.fadd(args[1], args[2])
        if isinstance(signature.args[0].dtype, types.Float):
            return added
        round_to_bf16 = _round_by_instruction if has_bf16_vectors() else _round_bits
        return _widened(builder, round_to_bf16(builder, added))

    return float32x16(array, float32x16, float32x16), codegen


def _widened(builder: Any, halves: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(halves, _WORDS), _words(16)), _FLOATS)


class BFloat16(ir.types.Type):
    """LLVM's type, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"


def _round_by_instruction(builder: Any, value: Any) -> Any:
    return builder.bitcast(builder.fptrunc(value, ir.VectorType(BFloat16(), LANES)), _HALVES)


def _round_bits(builder: Any, value: Any) -> Any:
    bits = builder.bitcast(value, _WORDS)
    even = builder.and_(builder.lshr(bits, _words(16)), _words(1))
    rounded = builder.lshr(builder.add(bits, builder.add(even, _words(0x7FFF))), _words(16))
    quiet = builder.or_(builder.lshr(bits, _words(16)), _words(0x40))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded), _HALVES)


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """The same float in all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), _words(0))

    return float32x16(types.float32), codegen


def _call(builder: Any, name: str, *operands: Any) -> Any:
    """One of LLVM's functions of vectors."""
    function = ir.FunctionType(_FLOATS, [_FLOATS] * len(operands))
    return builder.call(cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.v{LANES}f32"), operands)


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Emits a * b + c, as one instruction where there is one."""
    return _call(builder, "fmuladd", a, b, c)


def _fused(negative: bool) -> Any:
    @intrinsic
    def fused(typingctx: Any, c: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            c, a, b = args
            return multiply_add(builder, builder.fneg(a) if negative else a, b, c)

        return float32x16(float32x16, float32x16, float32x16), codegen

    return fused


# c + a * b and c - a * b as one instruction. Unlike sums of products they stay in the order written, so that in a
# recurrence what is known early can be added first.
add_product = _fused(False)
sub_product = _fused(True)


def _fold(builder: Any, vector: Any, join: Any) -> Any:
    """One number out of all lanes, always in the same order."""
    width, undefined = LANES, ir.Constant(_FLOATS, ir.Undefined)
    while width > 1:
        width //= 2
        order = [i + width if i < width else 0 for i in range(LANES)]
        vector = join(vector, builder.shuffle_vector(vector, undefined, ir.Constant(_WORDS, order)))
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


@intrinsic
def total(typingctx: Any, value: Any) -> Any:
    """The sum of all lanes, always in the same order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fold(builder, args[0], builder.fadd)

    return types.float32(float32x16), codegen


@intrinsic
def highest(typingctx: Any, value: Any) -> Any:
    """The largest of all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fold(builder, args[0], lambda a, b: _call(builder, "maxnum", a, b))

    return types.float32(float32x16), codegen


@intrinsic
def larger(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger of two in each lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "maxnum", *args)

    return float32x16(float32x16, float32x16), codegen


def _constant(number: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [number] * LANES)


_SHIFTER = 1.5 * 2**23 + 127  # adding it rounds to an integer, and leaves it as an exponent in the low bits


def _limited(builder: Any, x: Any, order: str, limit: float) -> Any:
    """The limit in lanes that are `order` ("<" or ">") it; NaN is neither, and stays."""
    return builder.select(builder.fcmp_ordered(order, x, _constant(limit)), _constant(limit), x)


_EXP = (0.49999231495155516, 0.16667114648959297, 0.04189015683876286, 0.008312520235198987)


def _exp(builder: Any, x: Any) -> Any:
    """2^n e^r, where n is the nearest whole number to x log2 e.

    e^r is 1 + r and r^2 times a polynomial, whose coefficients make the largest relative error for r within ln 2 / 2
    of 0 the least, 1.05e-7. Where a product and a sum are one instruction, r is exact but for ln 2 itself, 2.4e-7 at
    most. Products that do not wait for each other take half the time of one chain.
    """
    x = _limited(builder, x, "<", -87.33654)
    shifted = multiply_add(builder, x, _constant(1.4426950408889634), _constant(_SHIFTER))
    r = multiply_add(builder, builder.fsub(shifted, _constant(_SHIFTER)), _constant(-0.6931471805599453), x)
    low = multiply_add(builder, _constant(_EXP[1]), r, _constant(_EXP[0]))
    high = multiply_add(builder, _constant(_EXP[3]), r, _constant(_EXP[2]))
    square = builder.fmul(r, r)
    series = multiply_add(builder, multiply_add(builder, high, square, low), square, r)
    power = builder.bitcast(builder.shl(builder.bitcast(shifted, _WORDS), _words(23)), _FLOATS)
    return multiply_add(builder, series, power, power)


def _reciprocal(builder: Any, x: Any) -> Any:
    """Of lanes between 1 and 2^120: a guess, bettered by Newton's method.

    Processors that guess by an instruction do it to 14 bits; from the bits of a float, three steps are needed. Either
    takes less time than a division.
    """
    if has_wide_vectors():
        kind = ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS, ir.IntType(LANES)])
        guess = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.rcp14.ps.512")
        y, steps = builder.call(guess, [x, _constant(0.0), ir.IntType(LANES)(-1)]), 1
    else:
        y, steps = builder.bitcast(builder.sub(_words(0x7EF311C7), builder.bitcast(x, _WORDS)), _FLOATS), 3
    for _ in range(steps):
        y = multiply_add(builder, y, multiply_add(builder, builder.fneg(x), y, _constant(1.0)), y)
    return y


@intrinsic
def exp(typingctx: Any, value: Any) -> Any:
    """e to the power of each lane, which is up to 88, to 4e-7 relative; 1e-38 below -87. NaN stays."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _exp(builder, args[0])

    return float32x16(float32x16), codegen


@intrinsic
def sigmoid(typingctx: Any, value: Any) -> Any:
    """1 / (1 + e^-x) of each lane, to about 5e-7 relative above -80, where it ends at 2e-35."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        power = _exp(builder, _limited(builder, builder.fneg(args[0]), ">", 80.0))
        return _reciprocal(builder, builder.fadd(power, _constant(1.0)))

    return float32x16(float32x16), codegen


_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


@intrinsic
def normal_integral(typingctx: Any, value: Any) -> Any:
    """0.5 (1 + erf(z)) of each lane, to about 3e-7. NaN stays.

    Abramowitz and Stegun 7.1.26: erfc(z) = e^-z^2 times a polynomial of 1 / (1 + 0.3275911 z), for z from 0.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        z = args[0]
        size = _limited(builder, _call(builder, "fabs", z), ">", 12.0)
        t = _reciprocal(builder, multiply_add(builder, size, _constant(0.3275911), _constant(1.0)))
        series = _constant(_ERF[0])
        for factor in (*_ERF[1:], 0.0):
            series = multiply_add(builder, series, t, _constant(factor))
        power = _exp(builder, builder.fneg(builder.fmul(size, size)))
        beyond = builder.fmul(builder.fmul(series, power), _constant(0.5))
        negative = builder.fcmp_ordered("<", z, _constant(0.0))
        return builder.select(negative, beyond, builder.fsub(_constant(1.0), beyond))

    return float32x16(float32x16), codegen


def _binary(symbol: Any, instruction: str) -> None:
    @infer_global(symbol)
    class _Typing(ConcreteTemplate):
        cases = [typing_signature(float32x16, float32x16, float32x16)]  # noqa: RUF012

    @lower_builtin(symbol, float32x16, float32x16)
    def _lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args, flags=_FLAGS)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _binary(_symbol, _instruction)
