"""The learning rate and the size of a step over a run."""

import math

from .recipe import TrainingRecipe


def learning_rate(recipe: TrainingRecipe, step: int, progress: float, warmup: float) -> float:
    """Linear warm-up to the peak, then the schedule of the recipe over the rest of the run.

    Args:
        recipe: of the run.
        step: steps done.
        progress: fraction of the run done, in steps or in time, 0 to 1.
        warmup: the fraction at which the warm-up ended; any value before it has.

    Returns:
        The rate of the next step.
    """
    peak = recipe.learning_rate
    if step < recipe.warmup_steps:
        return peak * (step + 1) / recipe.warmup_steps
    begins = max(warmup, 1 - recipe.decay_part) if recipe.schedule == "wsd" else warmup
    if recipe.schedule == "constant" or progress <= begins:
        return peak
    done = min(1.0, (progress - begins) / (1 - begins)) if begins < 1 else 1.0
    height = (1 + math.cos(math.pi * done)) / 2 if recipe.schedule == "cosine" else 1 - done
    return peak * (recipe.final_learning_rate + (1 - recipe.final_learning_rate) * height)


def accumulated(recipe: TrainingRecipe, step: int) -> int:
    """Batches of a step: grows evenly from 1 to `accumulate` over `ramp_steps`."""
    if step >= recipe.ramp_steps:
        return recipe.accumulate
    return 1 + (recipe.accumulate - 1) * step // recipe.ramp_steps
