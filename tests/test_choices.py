"""Every choice of the architecture, alone and in random combinations, keeps what holds for a Megalodon."""

import pytest
import torch

from megalodon_lm import Megalodon, ModelConfig

ALONE = [
    {"attention": "sliding"},
    {"num_heads": 2, "heads_without_rope": 1},
    {"memory": "adaptive"},
    {"timestep_norm": "decay"},
    {"residual": "plain"},
    {"cema": "real"},
    {"cema": "none"},
    {"cema_omega": False},
    {"cema": "real", "cema_omega": False},
    {"attention_norm": "layer"},
    {"normalize_attention": False},
]


@pytest.mark.parametrize("changes", ALONE, ids=str)
def test_parameters(changes):
    config = ModelConfig.named("tiny", **changes)
    with torch.device("meta"):
        built = sum(p.numel() for p in Megalodon(config).parameters())
    assert built == config.num_parameters
