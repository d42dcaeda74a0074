"""Figures of a model's layers that tell how it remembers and attends."""

import math

import torch

from ..layers.block import Block
from ..model.decoder import Megalodon
from ..ops.cema import cema_coefficients


@torch.no_grad()
def inspect_layers(model: Megalodon) -> list[dict[str, float]]:
    """For each block: how long CEMA remembers, and how strongly attention differs from an even mean.

    Returns:
        `decay`: mean size of the states' factors |q|; `half_life`, `longest_half_life`: tokens after which a state has
        lost half, median and largest over channels and states; `query_gain`, `key_gain`: root mean square of the scales
        on normalised queries and keys; `output`: norm of CEMA's output weights gamma.
    """
    found = []
    for block in model.layers:
        assert isinstance(block, Block)
        cema, mega = block.mega.cema, block.mega
        _, q, _ = cema_coefficients(cema.alpha, cema.delta, cema.theta, cema.gamma)
        size = q.abs().double().clamp(max=1 - 1e-12)
        half_life = math.log(0.5) / size.log()
        query, key = (mega.gamma.float() + 1).square().mean(1).sqrt().tolist()
        found.append(
            {
                "decay": size.mean().item(),
                "half_life": half_life.median().item(),
                "longest_half_life": half_life.max().item(),
                "query_gain": query,
                "key_gain": key,
                "output": cema.gamma.norm().item(),
            }
        )
    return found
