"""Mamba-2: a selective state space model with one decay a head, whose recurrence is attention within chunks.

Source: Dao & Gu 2024 (arXiv 2405.21060), and the authors' library, from which proportions and initial values are.
docs/baselines.md has the formulas, and what differs.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration import Configuration, check_positive, check_sizes, require
from ..layers.embedding import Embedding
from ..layers.initialization import init_bert, init_time_step, init_uniform
from ..layers.linear import Linear
from ..layers.norms import RMSNorm
from ..layers.prenorm_block import PrenormBlock
from ..layers.silu_convolution import SiluConvolution
from ..model.decoder import Decoder, Head
from ..ops.boundaries import Boundaries
from ..ops.gates import silu_gate
from ..ops.norms import head_rms_norm
from ..ops.state_space_duality import state_space_duality
from ..sizing import TOLERANCE, round_width, usual_depth
from ..state_spec import declare

_STATE_DIM = 128  # of the library's models


@dataclass(frozen=True)
class Mamba2Config(Configuration):
    """A Mamba-2; its defaults are the 2.7B of the authors.

    Raises:
        InputError: naming the value, the rule it breaks and the remedy.
    """

    architecture: ClassVar[str] = "mamba2"

    vocab_size: int = 50_288
    """Tokens in the vocabulary."""
    num_layers: int = 64
    """Blocks; they have no feed-forward network, so there are twice as many as in a transformer."""
    model_dim: int = 2560
    """Width of the residual stream [D]."""
    expansion: int = 2
    """Width inside a block over D."""
    head_dim: int = 64
    """Width of a head [P]."""
    state_dim: int = _STATE_DIM
    """States for each feature of a head [N]."""
    num_groups: int = 1
    """Groups of heads that share what states take in and give out [G]."""
    num_taps: int = 4
    """Inputs that the short convolution sees."""
    norm_eps: float = 1e-5
    """Added to mean squares by every norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(
            self, "vocab_size", "num_layers", "model_dim", "expansion", "head_dim", "state_dim", "num_groups",
        )  # fmt: skip
        inner = self.expansion * self.model_dim
        require(inner % self.head_dim == 0, "head_dim", self.head_dim, f"must divide expansion * model_dim = {inner}")
        rule = f"must divide the {self.num_heads} heads"
        require(self.num_heads % self.num_groups == 0, "num_groups", self.num_groups, rule)
        require(self.num_taps >= 2, "num_taps", self.num_taps, "must be at least 2")
        check_positive(self, "norm_eps")

    @property
    def inner_dim(self) -> int:
        """Width inside a block."""
        return self.expansion * self.model_dim

    @property
    def num_heads(self) -> int:
        """Heads [H]."""
        return self.inner_dim // self.head_dim

    @property
    def convolved_dim(self) -> int:
        """Channels of the convolution: the inner features, and what states take in and give out."""
        return self.inner_dim + 2 * self.num_groups * self.state_dim

    @classmethod
    def sized(cls, parameters: int, vocab_size: int, **choices: Any) -> Self:
        """The configuration nearest to a number of parameters, in the proportions of the library.

        Twice the usual depth, heads of 64, about 128 states: these make up for the width being a multiple of 32.

        Args:
            parameters: wanted; from 100,000 on, with the vocabulary of bytes, within 1 %.
            vocab_size: tokens.
            choices: any but the width and the states.

        Raises:
            InputError: a choice that the number of parameters decides.
        """
        for field in ("model_dim", "state_dim"):
            require(field not in choices, field, choices.get(field), "follows from parameters; leave one of them out")
        given = {"vocab_size": vocab_size, "num_layers": 2 * usual_depth(parameters), **choices}
        smallest = cls.from_dict({"model_dim": choices.get("head_dim", 64), "state_dim": 1, **given})
        unit = smallest.head_dim * smallest.num_groups
        unit //= math.gcd(unit, smallest.expansion)

        def of(width: int, states: int) -> Any:  # mypy knows no Self here
            return cls.from_dict({"model_dim": width, "state_dim": states, **given})

        def preference(config: Any) -> tuple[float, float]:
            miss = max(abs(config.num_parameters / parameters - 1), TOLERANCE)
            return miss, abs(math.log(config.state_dim / _STATE_DIM))

        found: list[Any] = []
        width = unit
        while not found or of(width, 1).num_parameters < parameters:
            states = round_width(lambda n, w=width: of(w, n).num_parameters, parameters)  # type: ignore[misc]
            found.append(of(width, states))
            width += unit
        return min(found, key=preference)

    @property
    def num_parameters(self) -> int:
        """Trainable scalars."""
        d, inner, heads = self.model_dim, self.inner_dim, self.num_heads
        projections = d * (inner + self.convolved_dim + heads) + inner * d
        mixer = projections + (self.num_taps + 1) * self.convolved_dim + 3 * heads + inner
        return self.num_layers * (mixer + d) + d + 2 * self.vocab_size * d

    def flops_per_token(self, backward: bool = False) -> int:
        """Floating point operations per token, a multiply and an add as two, of linear maps, taps and the recurrence.

        The recurrence is counted as it is defined: reading and writing S. In chunks it costs more.

        Args:
            backward: count forward and backward (three times the forward) instead of forward alone.
        """
        d, inner = self.model_dim, self.inner_dim
        projections = d * (inner + self.convolved_dim + self.num_heads) + inner * d
        mixer = projections + self.num_taps * self.convolved_dim + 2 * inner * self.state_dim
        forward = 2 * (self.num_layers * mixer + self.vocab_size * d)
        return forward * (3 if backward else 1)


class Mamba2Mixer(nn.Module):
    """One projection to gate, features, states' inputs and outputs, and steps; convolution; recurrence; norm of gated.

    Its state is a dict: "convolution", its newest inputs, and "matrix", S. Parameter names are the library's.

    Args:
        config: the sizes.
    """

    spared: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias", "D")

    def __init__(self, config: Mamba2Config):
        super().__init__()
        c = self.config = config
        self.in_proj = Linear(c.model_dim, c.inner_dim + c.convolved_dim + c.num_heads, False, init_uniform)
        self.conv1d = SiluConvolution(c.convolved_dim, c.num_taps, True)
        self.dt_bias = nn.Parameter(torch.empty(c.num_heads))
        self.A_log = nn.Parameter(torch.empty(c.num_heads))
        self.D = nn.Parameter(torch.empty(c.num_heads))
        self.norm = RMSNorm(c.inner_dim, c.norm_eps)
        self.out_proj = Linear(c.inner_dim, c.model_dim, False, self._init_branch)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Decay rates A uniform from 1 to 16."""
        self.A_log.uniform_(1, 16).log_()
        init_time_step(self.dt_bias)
        nn.init.ones_(self.D)

    def _init_branch(self, weight: Tensor) -> None:
        init_uniform(weight)
        with torch.no_grad():
            weight /= math.sqrt(self.config.num_layers)

    @property
    def state_spec(self) -> dict[str, Any]:
        """Inputs of the convolution, and (H, N, P) in float32 or better."""
        c = self.config
        matrix = declare(c.num_heads, c.state_dim, c.head_dim, dtype=torch.float32)
        return {"convolution": self.conv1d.state_spec, "matrix": matrix}

    def forward(
        self, x: Tensor, state: dict[str, Tensor] | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, L, D) to the branch (B, L, D), and the exit state."""
        c, entry = self.config, state or {}
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        gate, convolved, step = self.in_proj(x).split([c.inner_dim, c.convolved_dim, c.num_heads], -1)
        convolved, newest = self.conv1d(convolved, entry.get("convolution"), boundaries)
        features, b, c_ = convolved.split([c.inner_dim, *(c.num_groups * c.state_dim,) * 2], -1)
        features = features.unflatten(-1, (c.num_heads, -1))
        b, c_ = (t.unflatten(-1, (c.num_groups, -1)) for t in (b, c_))
        step = F.softplus(step.to(wide) + self.dt_bias.to(wide))  # (B, L, H)
        log_decay = -self.A_log.to(wide).exp() * step

        given = features, b, c_, log_decay, step, self.D
        y, matrix = state_space_duality(*given, entry.get("matrix"), boundaries)
        y = silu_gate(gate.contiguous(), y.flatten(-2)).unflatten(-1, (c.num_groups, -1))
        scale = (self.norm.weight.to(wide) + 1).view(y.shape[-2:])
        y = head_rms_norm(y, scale, torch.zeros_like(scale), c.norm_eps)
        return self.out_proj(y.flatten(-2)), {"convolution": newest, "matrix": matrix}


class Mamba2(Decoder):
    """A decoder whose state does not grow; see Decoder.

    Args:
        config: the architecture.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    config_class = Mamba2Config

    def __init__(self, config: Mamba2Config, activation_checkpointing: bool = False):
        c = config

        def norm() -> RMSNorm:
            return RMSNorm(c.model_dim, c.norm_eps)

        super().__init__(
            c,
            Embedding(c.vocab_size, c.model_dim, False, 0.0, init_bert),
            (PrenormBlock(norm(), Mamba2Mixer(c)) for _ in range(c.num_layers)),
            Head(norm(), Linear(c.model_dim, c.vocab_size, False, init_bert)),
            activation_checkpointing,
        )
