"""Mamba: a state space model that the tokens steer, in blocks without attention or a feed-forward network.

Source: Gu & Dao 2023 (arXiv 2312.00752) and the authors' library, from which the initial values are.
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
from ..ops.selective_scan import selective_scan
from ..sizing import nearest_size, usual_depth
from ..state_spec import declare


@dataclass(frozen=True)
class MambaConfig(Configuration):
    """The architecture of one Mamba; its defaults are those of the published model of 130M parameters.

    Raises:
        InputError: naming the value, the rule it breaks and the remedy.
    """

    architecture: ClassVar[str] = "mamba"

    vocab_size: int = 50_280
    """Tokens in the vocabulary."""
    num_layers: int = 24
    """Blocks."""
    model_dim: int = 768
    """Width of the residual stream [D]."""
    inner_dim: int = 1536
    """Channels of the recurrence [I]."""
    state_dim: int = 16
    """States of a channel [N]."""
    num_taps: int = 4
    """Tokens that the convolution before the recurrence sees [K]."""
    norm_eps: float = 1e-5
    """Added to mean squares."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "vocab_size", "num_layers", "model_dim", "inner_dim", "state_dim", "num_taps")
        check_positive(self, "norm_eps")

    @classmethod
    def sized(cls, parameters: int, vocab_size: int, **choices: Any) -> Self:
        """The configuration nearest to a number of parameters.

        Twice the usual depth, as in the published sizes, since a block has no feed-forward network beside it; I is
        about twice the width, and makes up for the width being a multiple of 8 or more.

        Raises:
            InputError: a choice that the number of parameters decides.
        """
        for field in ("model_dim", "inner_dim"):
            require(field not in choices, field, choices.get(field), "follows from parameters; leave one of them out")
        given = {"vocab_size": vocab_size, "num_layers": 2 * usual_depth(parameters), **choices}

        def of(width: int, inner: int) -> Any:  # mypy knows no Self here
            return cls.from_dict({**given, "model_dim": width, "inner_dim": inner})

        return nearest_size(of, parameters, ratio=2)

    @property
    def step_rank(self) -> int:
        """Width of what the steps are made of [R]."""
        return -(-self.model_dim // 16)

    @property
    def num_parameters(self) -> int:
        """Trainable scalars."""
        d, i, n, r = self.model_dim, self.inner_dim, self.state_dim, self.step_rank
        mixer = 3 * d * i + (self.num_taps + 1) * i + i * (r + 2 * n) + (r + 1) * i + i * n + i
        return self.num_layers * (mixer + d) + d + 2 * self.vocab_size * d

    def flops_per_token(self, backward: bool = False) -> int:
        """Floating point operations per token, a multiply and an add as two.

        Linear maps, the convolution, and per state its decay, input and output; norms, gates and exponentials are left
        out.

        Args:
            backward: count forward and backward (three times the forward) instead of forward alone.
        """
        d, i, n, r = self.model_dim, self.inner_dim, self.state_dim, self.step_rank
        layer = 3 * d * i + i * (r + 2 * n) + r * i + self.num_taps * i + 3 * i * n
        forward = 2 * (self.num_layers * layer + self.vocab_size * d)
        return forward * (3 if backward else 1)


class MambaMixer(nn.Module):
    """x, z = in_proj(u); x = silu(convolution(x)); out_proj(scan(x; step, b and c of x) * silu(z)).

    Args:
        config: the sizes.
    """

    spared: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")

    def __init__(self, config: MambaConfig):
        super().__init__()
        c = config
        self.depth = c.num_layers
        self.sizes = [c.step_rank, c.state_dim, c.state_dim]
        self.in_proj = Linear(c.model_dim, 2 * c.inner_dim, False, init_uniform)
        self.conv1d = SiluConvolution(c.inner_dim, c.num_taps, True)
        self.x_proj = Linear(c.inner_dim, sum(self.sizes), False, init_uniform)
        self.dt_proj = Linear(c.step_rank, c.inner_dim, False, init_uniform)
        self.dt_bias = nn.Parameter(torch.empty(c.inner_dim))
        self.A_log = nn.Parameter(torch.empty(c.inner_dim, c.state_dim))
        self.D = nn.Parameter(torch.empty(c.inner_dim))
        self.out_proj = Linear(c.inner_dim, c.model_dim, False, self._init_branch)

    def _init_branch(self, weight: Tensor) -> None:
        init_uniform(weight)
        with torch.no_grad():
            weight /= math.sqrt(self.depth)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Small steps, and a = -1 ... -N in every channel."""
        init_time_step(self.dt_bias)
        self.A_log.copy_(torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    @property
    def state_spec(self) -> dict[str, Any]:
        """The inputs that the convolution still sees (K - 1, I), and the states (I, N) in float32 or better."""
        return {"convolution": self.conv1d.state_spec, "scan": declare(*self.A_log.shape, dtype=torch.float32)}

    def forward(
        self, u: Tensor, state: dict[str, Tensor] | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """u (B, L, D) to (B, L, D), and the exit state."""
        entry, leaving = state or {}, {}
        x, z = self.in_proj(u).chunk(2, -1)
        x, leaving["convolution"] = self.conv1d(x, entry.get("convolution"), boundaries)
        low, b, c = self.x_proj(x).split(self.sizes, -1)
        wide = torch.promote_types(self.A_log.dtype, torch.float32)  # steps and decays in float32 or better
        dt = F.softplus(self.dt_proj(low).to(wide) + self.dt_bias.to(wide))
        a = -self.A_log.to(wide).exp()
        y, leaving["scan"] = selective_scan(x, dt, a, b, c, self.D, entry.get("scan"), boundaries)
        return self.out_proj(silu_gate(z, y)), leaving


class Mamba(Decoder):
    """A Mamba, the language model; see Decoder."""

    config: MambaConfig
    config_class = MambaConfig

    def __init__(self, config: MambaConfig, activation_checkpointing: bool = False):
        c = config

        def norm() -> RMSNorm:
            return RMSNorm(c.model_dim, c.norm_eps)

        super().__init__(
            c,
            Embedding(c.vocab_size, c.model_dim, False, 0.0, init_bert),
            (PrenormBlock(norm(), MambaMixer(c)) for _ in range(c.num_layers)),
            Head(norm(), Linear(c.model_dim, c.vocab_size, False, init_bert)),
            activation_checkpointing,
        )
