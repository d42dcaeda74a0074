"""Kernels that share no code with each other: the same bits whatever else the process compiled or loaded.

Numba leaves helpers that were not inlined in every kernel as weak symbols: the copy that the process met first then
serves all kernels. The copies differ in the order of sums, by what LLVM knew when it made each; and a process that
compiles meets others than one that loads what is kept.
"""

from typing import Any

from llvmlite.binding import Linkage
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class _Library(JITCodeLibrary):
    def _optimize_final_module(self) -> None:
        self._optimize()
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.linkonce_odr:
                function.linkage = Linkage.internal  # only now: what to inline was to be decided as ever

    def _optimize(self) -> None:
        super()._optimize_final_module()


class _Calls(_Library):
    def _optimize(self) -> None:
        """All but the calls has been."""


class OwnCode(Compiler):
    """Numba's compiler, for kernels whose helpers are their own."""

    library: type[_Library] = _Library

    def define_pipelines(self) -> Any:
        state = self.state
        state.library = self.library(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return super().define_pipelines()


class Calls(OwnCode):
    """The same for kernels that call other kernels and do little else: those are not optimised a second time."""

    library = _Calls
