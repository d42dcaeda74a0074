"""Compiling what a training step runs."""

import torch

from ..errors import InputError
from ..model.decoder import Megalodon


def compile_blocks(model: Megalodon, device: torch.device) -> None:
    """Compile every block in place with torch.compile, at its first use; blocks of equal shapes share the code.

    Raises:
        InputError: no C++ compiler, which the CPU needs.
    """
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise InputError("training.compile = true needs a C++ compiler; install g++ or set it to false") from None
    for block in model.layers:
        block.compile()
