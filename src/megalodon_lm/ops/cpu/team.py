"""Tasks of a compiled kernel shared among the threads that PyTorch itself computes with.

PyTorch's OpenMP threads keep spinning for milliseconds after each of its operations, so that threads of any other pool
find the processors taken: measured on two of them, a second pool after a matrix product gained nothing, while OpenMP's
own threads halve the time and start in a microsecond. So compiled code calls the OpenMP runtime PyTorch loaded.
Where there is none with GCC's entry point, or after a fork, which no OpenMP team survives, other means stand in.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.compiler import Flags, compile_extra
from numba.extending import intrinsic

from .simd import as_numpy
from .threads import run_on_pool

_SHARES_PER_THREAD = 2
_SYMBOL = "megalodon_run_on_team"
_INT = ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)

_forked = False


def num_threads() -> int:
    """Threads that a kernel may use now."""
    return 1 if _forked else torch.get_num_threads()


def run_on_team(compiled: Callable[[int, int, tuple[Any, ...]], None], num_tasks: int, *args: Any) -> None:
    """Call a compiled function that shares `num_tasks` tasks, with the threads that may be used now.

    Tensors among the arguments go as their memory, in one row.
    """
    arrays = tuple(as_numpy(a).reshape(-1) if isinstance(a, torch.Tensor) else a for a in args)
    compiled(num_threads(), num_tasks, arrays)


@intrinsic
def share(typingctx: Any, kernel: Any, threads: Any, num_tasks: Any, args: Any) -> Any:
    """Run the tasks 0..num_tasks - 1 of a kernel on several threads; only inside compiled code.

    Threads take ranges of tasks as they become free. Tasks must not share what they write: then the result is bitwise
    the same for every number of threads.

    Args:
        kernel: compiled function, called as kernel(first, last, *args) for the tasks first..last - 1. An exception in
            it is lost: compile it with error_model="numpy".
        threads: from num_threads().
        num_tasks: 0 is allowed.
        args: tuple.
    """
    kinds = (types.int64, types.int64, *args)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        compiled = _compiled_here(typingctx, context, kernel.dispatcher, kinds)
        _, threads, num_tasks, arguments = values
        shares = builder.mul(threads, _INT(_SHARES_PER_THREAD))
        shares = builder.select(builder.icmp_signed("<", shares, num_tasks), shares, num_tasks)
        fields = [_INT(0), shares, num_tasks, arguments]  # the first one counts shares taken
        shared = cgutils.pack_struct(builder, fields)
        pointer = cgutils.alloca_once_value(builder, shared)

        function = ir.FunctionType(ir.VoidType(), [_POINTER])
        body = ir.Function(builder.module, function, builder.module.get_unique_name("team_body"))
        body.linkage = "internal"
        inner = ir.IRBuilder(body.append_basic_block())
        own = inner.bitcast(body.args[0], pointer.type)
        taken = cgutils.gep_inbounds(inner, own, 0, 0)
        total, tasks, inputs = (inner.load(cgutils.gep_inbounds(inner, own, 0, i)) for i in (1, 2, 3))
        loop, work, leave = (body.append_basic_block() for _ in range(3))
        inner.branch(loop)
        inner.position_at_end(loop)
        number = inner.atomic_rmw("add", taken, _INT(1), "monotonic")
        inner.cbranch(inner.icmp_signed("<", number, total), work, leave)
        inner.position_at_end(work)
        first = inner.sdiv(inner.mul(tasks, number), total)
        last = inner.sdiv(inner.mul(tasks, inner.add(number, _INT(1))), total)
        unpacked = [_borrowed(context, inner, kind, inner.extract_value(inputs, i)) for i, kind in enumerate(args)]
        context.call_internal_no_propagate(inner, compiled.fndesc, compiled.signature, [first, last, *unpacked])
        inner.branch(loop)
        inner.position_at_end(leave)
        inner.ret_void()

        unsigned = ir.IntType(32)
        run = ir.FunctionType(ir.VoidType(), [_POINTER, _POINTER, unsigned, unsigned])
        operands = [builder.bitcast(body, _POINTER), builder.bitcast(pointer, _POINTER)]
        operands += [builder.trunc(threads, unsigned), unsigned(0)]
        builder.call(cgutils.get_or_insert_function(builder.module, run, _SYMBOL), operands)
        return context.get_dummy_value()

    return types.void(kernel, types.int64, types.int64, args), codegen


def _compiled_here(typingctx: Any, context: Any, dispatcher: Any, kinds: tuple[Any, ...]) -> Any:
    """A kernel as part of the code that is being compiled: as a function of its own it would be optimised twice."""
    flags: Any = Flags()
    dispatcher.targetdescr.options.parse_as_flags(flags, dispatcher.targetoptions)
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    library = context.active_code_library
    return compile_extra(typingctx, dispatcher.targetctx, dispatcher.py_func, kinds, types.none, flags, {}, library)


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """A value whose arrays count no references; the caller holds them.

    The counters would be shared by all threads: every slice and every call of a helper changes them, and two threads
    that do so for each token of TimestepNorm took twice the time of one.
    """
    if isinstance(kind, types.BaseTuple):
        for i, inside in enumerate(kind):
            part = _borrowed(context, builder, inside, builder.extract_value(value, i))
            value = builder.insert_value(value, part, i)
    elif isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = ir.Constant(array.meminfo.type, None)
        array.parent = ir.Constant(array.parent.type, None)
        value = array._getvalue()
    return value


@_RUN
def _run_on_pool(body: int, shared: int, threads: int, _: int) -> None:
    """Stand-in for OpenMP."""
    work = _BODY(body)
    run_on_pool(lambda: work(shared), threads)


def _openmp_libraries() -> Iterator[ctypes.CDLL]:
    yield ctypes.CDLL(None) if os.name == "posix" else ctypes.CDLL("kernel32")
    for path in (Path(torch.__file__).parent / "lib").glob("lib*omp*"):
        try:
            yield ctypes.CDLL(str(path))
        except OSError:
            continue


def _connect() -> None:
    """Bind the symbol that compiled kernels call, GCC's GOMP_parallel(body, data, threads, flags) if it exists."""
    found = (getattr(library, "GOMP_parallel", None) for library in _openmp_libraries())
    run = next((entry for entry in found if entry is not None), _run_on_pool)
    address = ctypes.cast(run, ctypes.c_void_p).value
    assert address is not None
    llvm.add_symbol(_SYMBOL, address)


def _after_fork() -> None:
    """Leave a forked child one thread, in PyTorch's own operations too: they would wait for the parent's for ever."""
    global _forked
    _forked = True
    torch.set_num_threads(1)


_connect()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
