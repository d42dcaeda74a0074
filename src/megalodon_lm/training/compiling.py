"""Compiling what a training step runs."""

from collections.abc import Sequence
from typing import Any

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


def compile_kernels(
    model: LanguageModel, passes: Pass, device: torch.device, trials: Sequence[Any], carry_state: bool
) -> None:
    """Run some batches once, so that a run's clock finds all compiled.

    Where a kernel of the backward pass cannot be compiled, the run takes portable operators, as a forward pass does by
    itself. Neither weights nor random numbers change, and no gradient is left.

    Args:
        model: to train.
        passes: over it.
        device: where it is.
        trials: batches, of which some or other runs every kernel.
        carry_state: from each to the next.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            _run_once(passes, trials, carry_state)
        except KernelError as error:
            give_up(device.type, error)
            _run_once(passes, trials, carry_state)
    model.zero_grad(set_to_none=True)


def _run_once(passes: Pass, trials: Sequence[Any], carry_state: bool) -> None:
    state = None
    for batch in trials:
        after = passes(batch, state, batch.num_learnt).state
        state = after if carry_state else None


def trial_batches(recipe: TrainingRecipe) -> list[Batch]:
    """The two kinds of batches of a text, with and without a document's start."""
    length = min(recipe.length, 2 * recipe.segment or recipe.length)
    tokens = torch.zeros(recipe.batch_size, length, dtype=torch.int64)
    first = torch.zeros(tokens.shape, dtype=torch.bool)
    first[:, 0] = True
    return [Batch(tokens, tokens, starts, None, None) for starts in (first, None)]
