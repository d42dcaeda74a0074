"""Sixteen floats as one value inside compiled kernels.

Numba leaves vectorising to LLVM, which gives up on loops with several arrays and a recurrence. A value of the type
`float32x16` is one register (or a few narrower ones, where the processor has no wider), stays there across a loop, and
its products and sums fuse. bf16 arrays travel as uint16, since NumPy has no such type; `load` and `store` convert.
"""

import operator
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

LANES = 16
_FLAGS = ("contract", "reassoc", "nsz", "arcp")
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)


def compiled(function: Any) -> Any:
    """Compile for use outside the interpreter lock, and keep the result on disk."""
    return njit(nogil=True, cache=True, error_model="numpy")(function)


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
    """The memory of a contiguous CPU tensor as one row; bf16 as uint16."""
    t = t.detach()
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).reshape(-1).numpy()


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
        return builder.bitcast(builder.shl(builder.zext(halves, _WORDS), _words(16)), _FLOATS)

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
            bits = builder.bitcast(args[2], _WORDS)
            even = builder.and_(builder.lshr(bits, _words(16)), _words(1))
            rounded = builder.lshr(builder.add(bits, builder.add(even, _words(0x7FFF))), _words(16))
            quiet = builder.or_(builder.lshr(bits, _words(16)), _words(0x40))
            is_nan = builder.fcmp_unordered("uno", args[2], args[2])
            halves = builder.trunc(builder.select(is_nan, quiet, rounded), _HALVES)
            builder.store(halves, builder.bitcast(pointer, _HALVES.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, float32x16), codegen


@intrinsic
def splat(typingctx: Any, value: Any) -> Any:
    """The same float in all lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), _words(0))

    return float32x16(types.float32), codegen


def _fused(negative: bool) -> Any:
    @intrinsic
    def fused(typingctx: Any, c: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            function = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
            multiply_add = cgutils.get_or_insert_function(builder.module, function, f"llvm.fmuladd.v{LANES}f32")
            c, a, b = args
            return builder.call(multiply_add, [builder.fneg(a) if negative else a, b, c])

        return float32x16(float32x16, float32x16, float32x16), codegen

    return fused


# c + a * b and c - a * b as one instruction. Unlike sums of products they stay in the order written, so that in a
# recurrence what is known early can be added first.
add_product = _fused(False)
sub_product = _fused(True)


@intrinsic
def total(typingctx: Any, value: Any) -> Any:
    """The sum of all lanes, always in the same order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector, width = args[0], LANES
        undefined = ir.Constant(_FLOATS, ir.Undefined)
        while width > 1:
            width //= 2
            order = [i + width if i < width else 0 for i in range(LANES)]
            moved = builder.shuffle_vector(vector, undefined, ir.Constant(_WORDS, order))
            vector = builder.fadd(vector, moved)
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return types.float32(float32x16), codegen


@intrinsic
def exp(typingctx: Any, value: Any) -> Any:
    """e to the power of each lane, to about 2e-7 relative; 0 below -87, largest finite near 88.

    2^(x log2 e) with the fraction by a polynomial of degree 6 in Cody and Waite's reduced argument.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def constant(number: float) -> ir.Constant:
            return ir.Constant(_FLOATS, [number] * LANES)

        def call(name: str, *operands: Any) -> Any:
            full = f"llvm.{name}.v{LANES}f32"
            function = builder.module.globals.get(full)
            if function is None:
                function = ir.Function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * len(operands)), full)
            return builder.call(function, operands)

        x = call("minnum", call("maxnum", args[0], constant(-87.33654)), constant(88.37626))
        whole = call("rint", builder.fmul(x, constant(1.4426950408889634)))
        x = builder.fadd(x, builder.fmul(whole, constant(-0.693145751953125), ("contract",)), ("contract",))
        x = builder.fadd(x, builder.fmul(whole, constant(-1.42860677e-6), ("contract",)), ("contract",))
        y = constant(1 / 720)
        for factor in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            y = builder.fadd(builder.fmul(y, x, ("contract",)), constant(factor), ("contract",))
        bits = builder.shl(builder.add(builder.fptosi(whole, _WORDS), _words(127)), _words(23))
        return builder.fmul(y, builder.bitcast(bits, _FLOATS))

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
