"""AdamW over float32 weights, and the learning rate over the run."""

import math
from typing import Any

import torch
from torch import nn

from .recipe import TrainingRecipe


def build_optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.AdamW:
    """AdamW as in the authors' released code: every weight decays; norms are stored as offsets, so they decay to 1.

    With `decay_cema = false` the parameters of CEMA's decays and angles do not.
    """
    spared = () if recipe.decay_cema else ("alpha", "delta", "theta")
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[name.rsplit(".", 1)[-1] in spared]["params"].append(parameter)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=1e-8,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def learning_rate(recipe: TrainingRecipe, step: int, progress: float) -> float:
    """Linear warm-up, then the schedule of the recipe.

    Args:
        recipe: of the run.
        step: steps done.
        progress: fraction of the run done, in steps or in time, 0 to 1.
    """
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    done = min(1.0, progress)
    if recipe.schedule == "wsd":
        done = max(0.0, (done - 1) / recipe.decay_part + 1) if recipe.decay_part else 0.0
    height = 0.5 * (1 + math.cos(math.pi * done)) if recipe.schedule == "cosine" else 1 - done
    if recipe.schedule == "constant":
        height = 1.0
    return recipe.learning_rate * warm * (recipe.final_learning_rate + (1 - recipe.final_learning_rate) * height)
