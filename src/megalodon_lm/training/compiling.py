"""Compiling what a training step runs."""

import torch

from ..data.batches import Batch
from ..errors import InputError
from ..model.language_model import LanguageModel
from ..ops.backend import KernelError, give_up
from .passes import Pass
from .recipe import TrainingRecipe


def compile_blocks(model: LanguageModel, device: torch.device) -> None:
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


def compile_kernels(model: LanguageModel, passes: Pass, device: torch.device, recipe: TrainingRecipe) -> None:
    """Run the two kinds of batches once, with and without a document's start, so that a run's clock finds all compiled.

    Where a kernel of the backward pass cannot be compiled, the run takes portable operators, as a forward pass does by
    itself. Neither weights nor random numbers change, and no gradient is left.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            _run_once(passes, recipe)
        except KernelError as error:
            give_up(device.type, error)
            _run_once(passes, recipe)
    model.zero_grad(set_to_none=True)


def _run_once(passes: Pass, recipe: TrainingRecipe) -> None:
    length = min(recipe.length, 2 * recipe.segment or recipe.length)
    tokens = torch.zeros(recipe.batch_size, length, dtype=torch.int64)
    first = torch.zeros(tokens.shape, dtype=torch.bool)
    first[:, 0] = True
    state = None
    for starts in (first, None):
        batch = Batch(tokens, tokens, starts, None, None)
        state = passes(batch, state, batch.num_learnt).state if recipe.carry_state else None
