"""AdamW over float32 weights."""

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
