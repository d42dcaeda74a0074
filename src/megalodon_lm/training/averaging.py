"""Averaging the weights of a model over its training."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..model.language_model import LanguageModel
from ..parallel.ranks import held_as


class WeightAverage:
    """An exponential average of a model's weights that the initial ones leave no trace in.

    Args:
        model: that trains.
        decay: d; the average over n steps weighs them by 1, d, ... d^(n - 1), from the newest back.
    """

    def __init__(self, model: LanguageModel, decay: float):
        self.decay, self.steps = decay, 0
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def update(self, model: LanguageModel) -> None:
        """Take a step's weights in."""
        names, weights = zip(*model.named_parameters(), strict=True)
        self.steps += 1
        newest_share = (1 - self.decay) / -math.expm1(self.steps * math.log(self.decay))  # by the sum of all weights
        torch._foreach_lerp_([self.weights[n] for n in names], [w.detach() for w in weights], newest_share)

    @contextmanager
    def applied(self, model: LanguageModel) -> Iterator[None]:
        """The model with the averaged weights."""
        own = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        put(model, self.weights)
        try:
            yield
        finally:
            put(model, own)


@torch.no_grad()
def put(model: LanguageModel, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model, by name."""
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight if hasattr(weight, "full_tensor") else held_as(weight, parameters[name]))
