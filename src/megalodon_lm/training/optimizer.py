"""AdamW over float32 weights, and the learning rate over the run."""

import math

import torch
from torch import nn

from .recipe import TrainingRecipe


def build_optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.AdamW:
    """AdamW as in the authors' released code: every weight decays; norms are stored as offsets, so they decay to 1."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=1e-8,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def learning_rate(recipe: TrainingRecipe, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine.

    Args:
        recipe: of the run.
        step: steps done.
        progress: fraction of the run done, in steps or in time, 0 to 1.
    """
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return recipe.learning_rate * warm * (recipe.final_learning_rate + (1 - recipe.final_learning_rate) * cosine)
