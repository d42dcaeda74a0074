"""The optimiser of a run."""

from typing import Any

import torch
from torch import nn

from ..layers.complex_ema import ComplexEMA
from ..model.language_model import LanguageModel
from .muon import Muon
from .recipe import TrainingRecipe

MOMENTUM = 0.95  # of Muon


def build_optimizer(model: LanguageModel, recipe: TrainingRecipe, precision: str) -> torch.optim.AdamW:
    """AdamW as in the authors' released code, or Muon for the linear layers of the blocks and AdamW for the rest.

    Weights decay, but for those that a module names in an attribute `spared`, such as what makes the decays of its
    states; norms are stored as offsets, so they decay to 1. With `decay_cema = true` those of CEMA decay nevertheless.
    Each group has a `scale`: its learning rate over that of the recipe.

    Args:
        model: with the parameters.
        recipe: with the choices.
        precision: of the products in Muon.
    """
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)} if recipe.optimizer == "muon" else set()
    spared = {
        getattr(module, name)
        for module in model.modules()
        if not (recipe.decay_cema and isinstance(module, ComplexEMA))
        for name in getattr(module, "spared", ())
    }
    decaying: list[nn.Parameter] = []
    steady: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter in linear and name.startswith("layers."):
            matrices.append(parameter)
        else:
            (steady if parameter in spared else decaying).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decaying, "scale": 1.0},
        {"params": steady, "scale": 1.0, "weight_decay": 0.0},
        {
            "params": matrices,
            "scale": recipe.matrix_learning_rate / recipe.learning_rate,
            "matrices": True,
            "momentum": MOMENTUM,
        },
    ]
    adamw: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.beta1, recipe.beta2),
        "eps": 1e-8,
        "weight_decay": recipe.weight_decay,
        "fused": True,
    }
    groups = [group for group in groups if group["params"]]
    if not matrices:
        return torch.optim.AdamW(groups, **adamw)
    return Muon(groups, torch.bfloat16 if precision == "bf16" else torch.float32, **adamw)
