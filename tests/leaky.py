"""The smallest architecture that is worth the name: each channel sees a running mean of its past that forgets.

It stands in no registry; the tests put it there, as a package that brings an architecture of its own would.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from megalodon_lm.configuration import Configuration, check_sizes
from megalodon_lm.layers.embedding import Embedding
from megalodon_lm.layers.initialization import init_embedding, init_he
from megalodon_lm.layers.linear import Linear
from megalodon_lm.layers.norms import RMSNorm
from megalodon_lm.model.decoder import Decoder, Head
from megalodon_lm.sizing import round_width
from megalodon_lm.state_spec import declare


@dataclass(frozen=True)
class LeakyConfig(Configuration):
    architecture: ClassVar[str] = "leaky"
    vocab_size: int = 259
    num_layers: int = 2
    dim: int = 64

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, "vocab_size", "num_layers", "dim")

    @property
    def num_parameters(self):
        return self.num_layers * (self.dim**2 + 2 * self.dim) + self.dim + 2 * self.vocab_size * self.dim

    def flops_per_token(self, backward=False):
        forward = 2 * (self.num_layers * (self.dim**2 + 2 * self.dim) + self.vocab_size * self.dim)
        return (3 if backward else 1) * forward

    @classmethod
    def sized(cls, parameters, vocab_size, **choices):
        def of(dim):
            return cls(vocab_size=vocab_size, dim=dim, **choices)

        return of(round_width(lambda dim: of(dim).num_parameters, parameters))


class LeakyBlock(nn.Module):
    spared: ClassVar = ("decay",)

    def __init__(self, dim):
        super().__init__()
        self.norm, self.out = RMSNorm(dim, 1e-5), Linear(dim, dim, False, init_he)
        self.decay = nn.Parameter(torch.empty(dim))

    def init_weights(self):
        nn.init.normal_(self.decay)

    @property
    def state_spec(self):
        return {"mean": declare(len(self.decay), dtype=torch.float32)}

    def forward(self, x, state=None, boundaries=None):
        values, decay = self.norm(x).to(self.decay.dtype), self.decay.sigmoid()
        mean = torch.zeros_like(values[:, 0]) if state is None else state.tree["mean"]
        starts = None if boundaries is None else boundaries.starts
        valid = None if boundaries is None else boundaries.valid(x.shape[1])
        means = []
        for t in range(x.shape[1]):
            entry = mean if starts is None else torch.where(starts[:, t, None], torch.zeros_like(mean), mean)
            following = torch.lerp(values[:, t], entry, decay)
            mean = following if valid is None else torch.where(valid[:, t, None], following, mean)
            means.append(mean)
        return x + self.out(torch.stack(means, 1)), {"mean": mean}


class Leaky(Decoder):
    config_class = LeakyConfig

    def __init__(self, config, activation_checkpointing=False):
        super().__init__(
            config,
            Embedding(config.vocab_size, config.dim, False, 0.0),
            (LeakyBlock(config.dim) for _ in range(config.num_layers)),
            Head(RMSNorm(config.dim, 1e-5), Linear(config.dim, config.vocab_size, False, init_embedding)),
            activation_checkpointing,
        )
