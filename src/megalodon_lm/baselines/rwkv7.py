"""RWKV-7 ("Goose"): a matrix for each head, changed by a delta rule whose decays and rates the tokens decide.

Source: Peng et al. 2025 (arXiv 2503.14456), and the authors' code for initial values; docs/baselines.md has the
formulas and what differs.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..configuration import Configuration, check_sizes, require
from ..layers.embedding import Embedding
from ..layers.linear import Linear
from ..layers.norms import LayerNorm
from ..model.decoder import Decoder, Head
from ..ops.boundaries import Boundaries
from ..sizing import nearest_size, usual_depth
from ..state_spec import Sealed, Tree
from .rwkv7_blocks import NORM_EPS, Rwkv7Block, low_rank_widths


@dataclass(frozen=True)
class Rwkv7Config(Configuration):
    """The architecture of one RWKV-7; widths of its low-rank maps follow from that of the model.

    Raises:
        InputError: naming the value, the rule it breaks and the remedy.
    """

    architecture = "rwkv7"

    vocab_size: int = 32_000
    """Tokens in the vocabulary."""
    num_layers: int = 12
    """Blocks."""
    model_dim: int = 768
    """Width of the residual stream [D]."""
    head_dim: int = 64
    """Features of a head [K]: its matrix is K x K."""
    ffn_hidden_dim: int = 3072
    """Width inside the mixing of channels [F]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "vocab_size", "num_layers", "model_dim", "head_dim", "ffn_hidden_dim")
        rule = f"must divide model_dim = {self.model_dim}; {math.gcd(self.model_dim, self.head_dim)} does"
        require(self.model_dim % self.head_dim == 0, "head_dim", self.head_dim, rule)
        require(self.head_dim > 1, "head_dim", self.head_dim, "must be at least 2")

    @classmethod
    def sized(cls, parameters: int, vocab_size: int, **choices: Any) -> Self:
        """The configuration nearest to a number of parameters, in the authors' proportions.

        The usual depth unless chosen otherwise; heads of 64 where that divides the width, which is a multiple of 32,
        else of 32; F about four times the width.

        Args:
            parameters: wanted; from 100,000 on, with the vocabulary of bytes, within 1 %.
            vocab_size: tokens.
            choices: num_layers and head_dim.

        Raises:
            InputError: a choice that the number of parameters decides.
        """
        for field in ("model_dim", "ffn_hidden_dim"):
            require(field not in choices, field, choices.get(field), "follows from parameters; leave one of them out")
        given = {"vocab_size": vocab_size, "num_layers": usual_depth(parameters), **choices}
        cls.from_dict({"model_dim": given.get("head_dim", 64), **given})  # refuses what is not a size

        def of(width: int, hidden: int) -> Any:  # mypy knows no Self here
            heads = {"head_dim": 64 if width % 64 == 0 else 32, **given}
            return cls.from_dict({"model_dim": width, "ffn_hidden_dim": hidden, **heads})

        return nearest_size(of, parameters, 4, math.lcm(32, given.get("head_dim", 32)))

    @property
    def _matrices(self) -> int:
        """Scalars of the matrices of all blocks."""
        d = self.model_dim
        w, a, v, g = low_rank_widths(d)
        return self.num_layers * (4 * d * d + 2 * d * (w + a + v + g) + 2 * d * self.ffn_hidden_dim) - 2 * d * v

    @property
    def num_parameters(self) -> int:
        """Trainable scalars."""
        d = self.model_dim
        vectors = self.num_layers * 19 * d - d  # 7 mixtures, w0, a0, v0, k_k, k_a, r_k, three norms; no v0 in the first
        return self._matrices + vectors + 4 * d + 2 * self.vocab_size * d

    def flops_per_token(self, backward: bool = False) -> int:
        """Floating point operations per token, a multiply and an add as two, of the recurrence as it is defined.

        Linear maps, and for each element of the matrices: asking, decay, what two products of rank 1 add, and reading.

        Args:
            backward: count forward and backward (three times the forward) instead of forward alone.
        """
        recurrence = 9 * self.num_layers * self.model_dim * self.head_dim
        forward = 2 * (self._matrices + self.vocab_size * self.model_dim) + recurrence
        return forward * (3 if backward else 1)


class Rwkv7(Decoder):
    """RWKV-7; see Decoder.

    Args:
        config: the architecture.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    config: Rwkv7Config
    config_class = Rwkv7Config

    def __init__(self, config: Rwkv7Config, activation_checkpointing: bool = False):
        sizes = config.model_dim, config.head_dim, config.ffn_hidden_dim
        super().__init__(
            config,
            _Embedding(config.vocab_size, config.model_dim, False, 0.0),
            (Rwkv7Block(*sizes, i, config.num_layers) for i in range(config.num_layers)),
            Head(LayerNorm(config.model_dim, NORM_EPS), Linear(config.model_dim, config.vocab_size, False, _init_head)),
            activation_checkpointing,
        )

    def through(self, x: Tensor, state: Tree, boundaries: Boundaries | None) -> tuple[Tensor, Tree]:
        """As that of Decoder; the values of the first block go beside the stream, from block to block."""
        first: Tensor | None = None
        layers = []
        for i, block in enumerate(self.layers):
            given = x, first, None if state is None else Sealed(state[i]), boundaries
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, first, leaving = checkpoint(block, *given, use_reentrant=False)
            else:
                x, first, leaving = block(*given)
            layers.append(leaving)
        return x, tuple(layers)


class _Embedding(Embedding):
    """With small values, which the LayerNorm behind it makes large: so they learn fast."""

    def init_weights(self) -> None:
        """Draw the weight."""
        nn.init.uniform_(self.weight, -1e-4, 1e-4)


def _init_head(weight: Tensor) -> None:
    """Orthogonal, with the gain of the authors' code."""
    vocab_size, dim = weight.shape
    nn.init.orthogonal_(weight, gain=0.5 * math.sqrt(max(1.0, vocab_size / dim)))
