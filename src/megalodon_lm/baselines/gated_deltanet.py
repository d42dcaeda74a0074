"""Gated DeltaNet: linear attention that corrects what it holds under a key, and forgets.

Source: Yang et al. 2024 (arXiv 2412.06464), and the layer of flash-linear-attention, the authors' library, from which
proportions and initial values are. docs/baselines.md has the formulas, and what differs.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration import Configuration, check_positive, check_sizes, require
from ..layers.embedding import Embedding
from ..layers.feed_forward import FeedForward
from ..layers.initialization import init_bert, init_time_step
from ..layers.linear import Linear
from ..layers.norms import RMSNorm
from ..layers.prenorm_block import PrenormBlock
from ..layers.silu_convolution import SiluConvolution
from ..model.decoder import Decoder, Head
from ..ops.boundaries import Boundaries
from ..ops.gated_delta_rule import gated_delta_rule
from ..ops.gates import silu_gate
from ..ops.norms import head_rms_norm
from ..sizing import nearest_size, usual_depth
from ..state_spec import declare

_KEY_EPS = 1e-6  # added to the squared norm of queries and keys


@dataclass(frozen=True)
class GatedDeltaNetConfig(Configuration):
    """A Gated DeltaNet; its defaults are the 1.3B of the authors' library.

    Raises:
        InputError: naming the value, the rule it breaks and the remedy.
    """

    architecture: ClassVar[str] = "gated_deltanet"

    vocab_size: int = 32_000
    """Tokens in the vocabulary."""
    num_layers: int = 21
    """Blocks."""
    model_dim: int = 2048
    """Width of the residual stream [D]."""
    num_heads: int = 6
    """Heads [H]."""
    head_dim: int = 256
    """Width of a head's queries and keys [N]."""
    value_head_dim: int = 512
    """Width of a head's values and gate [P]."""
    ffn_hidden_dim: int = 5632
    """Width inside the feed-forward network [F]."""
    num_taps: int = 4
    """Inputs that the short convolutions see."""
    norm_eps: float = 1e-6
    """Added to mean squares by every norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(
            self, "vocab_size", "num_layers", "model_dim", "num_heads", "head_dim", "value_head_dim", "ffn_hidden_dim",
        )  # fmt: skip
        require(self.num_taps >= 2, "num_taps", self.num_taps, "must be at least 2")
        check_positive(self, "norm_eps")

    @classmethod
    def sized(cls, parameters: int, vocab_size: int, **choices: Any) -> Self:
        """The configuration nearest to a number of parameters, in the proportions of the library.

        Queries and keys are three quarters as wide as the stream, values and gate twice that. Heads are about an eighth
        as wide as the stream, from 64 to 256. F is about 8/3 D; it makes up for widths being multiples of 32.

        Args:
            parameters: wanted; from 100,000 on, with the vocabulary of bytes, within 1 %.
            vocab_size: tokens.
            choices: any but the widths and the number of heads.

        Raises:
            InputError: a choice that the number of parameters decides.
        """
        for field in ("model_dim", "num_heads", "head_dim", "value_head_dim", "ffn_hidden_dim"):
            require(field not in choices, field, choices.get(field), "follows from parameters; leave one of them out")
        given = {"vocab_size": vocab_size, "num_layers": usual_depth(parameters), **choices}

        def of(width: int, hidden: int) -> Any:  # mypy knows no Self here
            heads = _heads_of(width * 3 // 4, min(max(width // 8, 64), 256))
            head_dim = width * 3 // 4 // heads
            sizes = {"num_heads": heads, "head_dim": head_dim, "value_head_dim": 2 * head_dim, "ffn_hidden_dim": hidden}
            return cls.from_dict({"model_dim": width, **sizes, **given})

        return nearest_size(of, parameters, 8 / 3, 32)

    @property
    def num_parameters(self) -> int:
        """Trainable scalars."""
        d, h, n, p = self.model_dim, self.num_heads, self.head_dim, self.value_head_dim
        mixer = d * h * (2 * n + 3 * p + 2) + self.num_taps * h * (2 * n + p) + 2 * h + p
        return self.num_layers * (mixer + 3 * d * self.ffn_hidden_dim + 2 * d) + d + 2 * self.vocab_size * d

    def flops_per_token(self, backward: bool = False) -> int:
        """Floating point operations per token, a multiply and an add as two, of linear maps, taps and the recurrence.

        The recurrence is counted as it is defined: reading, correcting and writing S. In chunks it costs more.

        Args:
            backward: count forward and backward (three times the forward) instead of forward alone.
        """
        d, h, n, p = self.model_dim, self.num_heads, self.head_dim, self.value_head_dim
        mixer = d * h * (2 * n + 3 * p + 2) + self.num_taps * h * (2 * n + p) + 3 * h * n * p
        forward = 2 * (self.num_layers * (mixer + 3 * d * self.ffn_hidden_dim) + self.vocab_size * d)
        return forward * (3 if backward else 1)


def _heads_of(width: int, wanted: int) -> int:
    """How many heads of about a wanted width make up a width; their width is a multiple of 8 where that can be."""
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    return min(divisors, key=lambda n: (width // n % 8 != 0, abs(math.log(width / n / wanted))))


class GatedDeltaNetMixer(nn.Module):
    """The layer in the place of attention: projections, short convolutions, the gated delta rule, norm and gate.

    Its state is a dict: "q", "k" and "v", the newest inputs of the convolutions, and "matrix", S.
    """

    spared: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

    def __init__(self, config: GatedDeltaNetConfig):
        super().__init__()
        c = self.config = config
        key_dim, value_dim = c.num_heads * c.head_dim, c.num_heads * c.value_head_dim
        linear = partial(Linear, bias=False, init=init_bert)
        self.q_proj = linear(c.model_dim, key_dim)
        self.k_proj = linear(c.model_dim, key_dim)
        self.v_proj = linear(c.model_dim, value_dim)
        self.g_proj = linear(c.model_dim, value_dim)
        self.a_proj = linear(c.model_dim, c.num_heads)
        self.b_proj = linear(c.model_dim, c.num_heads)
        self.o_proj = linear(value_dim, c.model_dim)
        self.q_conv = SiluConvolution(key_dim, c.num_taps, False)
        self.k_conv = SiluConvolution(key_dim, c.num_taps, False)
        self.v_conv = SiluConvolution(value_dim, c.num_taps, False)
        self.A_log = nn.Parameter(torch.empty(c.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.num_heads))
        self.o_norm = RMSNorm(c.value_head_dim, c.norm_eps)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Decay rates A uniform up to 16."""
        self.A_log.uniform_(1e-3, 16).log_()
        init_time_step(self.dt_bias)

    @property
    def state_spec(self) -> dict[str, Any]:
        """Inputs of the convolutions, and (H, N, P) in float32 or better."""
        c = self.config
        matrix = declare(c.num_heads, c.head_dim, c.value_head_dim, dtype=torch.float32)
        convolutions = {"q": self.q_conv.state_spec, "k": self.k_conv.state_spec, "v": self.v_conv.state_spec}
        return {**convolutions, "matrix": matrix}

    def forward(
        self, x: Tensor, state: dict[str, Tensor] | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, L, D) to the branch (B, L, D), and the exit state."""
        c, entry = self.config, state or {}
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        q, left_q = self.q_conv(self.q_proj(x), entry.get("q"), boundaries)
        k, left_k = self.k_conv(self.k_proj(x), entry.get("k"), boundaries)
        v, left_v = self.v_conv(self.v_proj(x), entry.get("v"), boundaries)
        q, k = self._normalised(q, c.head_dim**-1), self._normalised(k, c.head_dim**-0.5)
        log_decay = -self.A_log.to(wide).exp() * F.softplus(self.a_proj(x).to(wide) + self.dt_bias.to(wide))
        beta = torch.sigmoid(self.b_proj(x).to(wide))

        v = v.unflatten(-1, (c.num_heads, -1))
        y, matrix = gated_delta_rule(q, k, v, log_decay, beta, entry.get("matrix"), boundaries)
        gated = silu_gate(self.g_proj(x), self.o_norm(y).flatten(-2))
        return self.o_proj(gated), {"q": left_q, "k": left_k, "v": left_v, "matrix": matrix}

    def _normalised(self, x: Tensor, scale: float) -> Tensor:
        """(B, L, H N) to (B, L, H, N), with the root mean square of each head at a scale."""
        c = self.config
        heads = x.unflatten(-1, (c.num_heads, -1))
        scales = self.A_log.new_full((c.num_heads, c.head_dim), scale)
        return head_rms_norm(heads, scales, torch.zeros_like(scales), _KEY_EPS / c.head_dim)


class GatedDeltaNet(Decoder):
    """A decoder whose state does not grow; see Decoder.

    Args:
        config: the architecture.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    config_class = GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig, activation_checkpointing: bool = False):
        c = config

        def norm() -> RMSNorm:
            return RMSNorm(c.model_dim, c.norm_eps)

        def feed_forward() -> FeedForward:
            return FeedForward(norm(), c.model_dim, c.ffn_hidden_dim, True, None, init_bert, 0.0, 0.0)

        super().__init__(
            c,
            Embedding(c.vocab_size, c.model_dim, False, 0.0, init_bert),
            (PrenormBlock(norm(), GatedDeltaNetMixer(c), feed_forward()) for _ in range(c.num_layers)),
            Head(norm(), Linear(c.model_dim, c.vocab_size, False, init_bert)),
            activation_checkpointing,
        )
