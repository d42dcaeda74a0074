"""MEGA, the predecessor of Megalodon: a moving average with real states, and one head of attention inside chunks.

Source: Ma et al. 2022 (arXiv 2209.10655) and the authors' code, from which the initial values are; docs/baselines.md
says what differs.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..configuration import Configuration, check_positive, check_sizes, require
from ..layers.chunk_attention import ChunkAttention
from ..layers.complex_ema import ComplexEMA
from ..layers.embedding import Embedding
from ..layers.feed_forward import FeedForward
from ..layers.initialization import init_bert, init_embedding
from ..layers.linear import Linear
from ..layers.norms import LayerNorm
from ..model.decoder import Decoder, Head
from ..ops.boundaries import Boundaries
from ..ops.cema import ema_coefficients
from ..ops.derived import derived
from ..ops.gates import silu, silu_gate
from ..sizing import nearest_size, usual_depth
from ..state_spec import Sealed, Tree


@dataclass(frozen=True)
class MegaConfig(Configuration):
    """The architecture of one MEGA; its defaults are those of the authors' model of enwik8.

    Raises:
        InputError: naming the value, the rule it breaks and the remedy.
    """

    architecture: ClassVar[str] = "mega"

    vocab_size: int = 259
    """Tokens in the vocabulary."""
    num_layers: int = 12
    """Blocks."""
    model_dim: int = 512
    """Width of the residual stream [D]."""
    z_dim: int = 128
    """Width of queries and keys [Z]."""
    value_dim: int = 1024
    """Width of values and gate [V]."""
    ffn_hidden_dim: int = 1024
    """Width inside the feed-forward network [F]."""
    ema_ndim: int = 16
    """States per channel of the moving average [N]."""
    chunk_size: int = 2048
    """Tokens in an attention chunk [c]."""
    norm_eps: float = 1e-5
    """Added to variances."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "vocab_size", "num_layers", *_WIDTHS, "ema_ndim", "chunk_size")
        require(self.z_dim % 2 == 0, "z_dim", self.z_dim, f"must be even for rotary positions; use {self.z_dim + 1}")
        check_positive(self, "norm_eps", "rope_base")

    @classmethod
    def sized(cls, parameters: int, vocab_size: int, **choices: Any) -> Self:
        """The configuration nearest to a number of parameters, in the proportions of the authors' models of text.

        The usual depth and a chunk of 512 unless chosen otherwise; Z is a quarter of the width, V twice, F about twice:
        it makes up for the width being a multiple of 8 or more.

        Raises:
            InputError: a choice that the number of parameters decides.
        """
        for field in _WIDTHS:
            require(field not in choices, field, choices.get(field), "follows from parameters; leave one of them out")
        given = {"vocab_size": vocab_size, "num_layers": usual_depth(parameters), "chunk_size": 512, **choices}

        def of(width: int, hidden: int) -> Any:  # mypy knows no Self here
            sizes = {"model_dim": width, "z_dim": width // 4, "value_dim": 2 * width, "ffn_hidden_dim": hidden}
            return cls.from_dict({**given, **sizes})

        return nearest_size(of, parameters, ratio=2)

    @property
    def reading_unit(self) -> int:
        """A chunk."""
        return self.chunk_size

    @property
    def num_parameters(self) -> int:
        """Trainable scalars."""
        d, z, v, f, n = self.model_dim, self.z_dim, self.value_dim, self.ffn_hidden_dim, self.ema_ndim
        attention = 4 * d * n + d + (d * z + z) + 2 * (d * v + v) + 2 * (d * d + d) + v * d + 4 * z
        layer = attention + (d * f + f) + (f * d + d) + 4 * d
        return self.num_layers * layer + 2 * d + 2 * self.vocab_size * d

    def flops_per_token(self, backward: bool = False) -> int:
        """Floating point operations per token, a multiply and an add as two, at the mean attention span of full chunks.

        Linear maps; scores over Z and sums over V; per state of the average its decay, input and output. Norms and
        gates are left out.

        Args:
            backward: count forward and backward (three times the forward) instead of forward alone.
        """
        d, z, v, f = self.model_dim, self.z_dim, self.value_dim, self.ffn_hidden_dim
        linear = d * z + 3 * d * v + 2 * d * d + 2 * d * f
        layer = linear + (self.chunk_size + 1) / 2 * (z + v) + 3 * d * self.ema_ndim
        forward = 2 * (self.num_layers * layer + self.vocab_size * d)
        return round(forward * (3 if backward else 1))


_WIDTHS = ("model_dim", "z_dim", "value_dim", "ffn_hidden_dim")


def damped_coefficients(alpha: Tensor, delta: Tensor, beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of ema_coefficients for a channel that is first spread over its N states by beta (D, N, 1)."""
    p, q, g = ema_coefficients(alpha, delta, gamma)
    return p * beta.to(p.dtype).squeeze(-1), q, g


class DampedEMA(ComplexEMA):
    """The multi-dimensional damped moving average, of states that do not turn, with silu after it.

    h_t = (1 - p d) h_{t-1} + p beta x_t; y_t = silu(sum_n gamma_n h_{t,n} / sqrt(N) + omega x_t), p and d sigmoids.
    Initial values: alpha, delta normal with std 0.2; beta +1, -1, +1 ... with noise of std 0.02; gamma, omega normal
    with std 1.
    """

    spared: ClassVar[tuple[str, ...]] = ("alpha", "delta")

    def __init__(self, dim: int, ndim: int):
        super().__init__(dim, ndim, rotating=False)
        self.beta = nn.Parameter(torch.empty(dim, ndim, 1))

    def init_weights(self) -> None:
        """Draw the initial values."""
        super().init_weights()
        assert self.omega is not None
        nn.init.normal_(self.omega)
        nn.init.normal_(self.beta, std=0.02)
        with torch.no_grad():
            self.beta[:, ::2] += 1
            self.beta[:, 1::2] -= 1

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """p beta, q and g of the recurrence."""
        return derived(damped_coefficients, self.alpha, self.delta, self.beta, self.gamma)

    def forward(
        self, x: Tensor, state: Tensor | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, D) and the entry state (B, D, N, 1) to y (B, L, D) and the exit state."""
        y, leaving = super().forward(x, state, boundaries)
        return silu(y), leaving


class MovingAverageAttention(nn.Module):
    """A norm, a moving average, attention of one head, a gate on it, and a gate between the input and what came of it.

    n = norm(x); m = average(n); z = silu(wz m); q, k = gamma z + beta; v = silu(wv n);
    candidate = silu(wc m + wh(silu(wr m) * attention(q, k, v))); y = x + sigmoid(wu m) * (candidate - x).
    """

    def __init__(self, config: MegaConfig):
        super().__init__()
        d, z, v = config.model_dim, config.z_dim, config.value_dim
        self.norm = LayerNorm(d, config.norm_eps)
        self.ema = DampedEMA(d, config.ema_ndim)
        self.attention = ChunkAttention(config.chunk_size, config.rope_base, 0.0, False)
        self.wv = Linear(d, v, True, init_bert)
        self.wz = Linear(d, z, True, init_bert)
        self.wr = Linear(d, v, True, init_bert)
        self.wu = Linear(d, d, True, init_bert)
        self.wc = Linear(d, d, True, init_bert)
        self.wh = Linear(v, d, False, init_bert)
        self.gamma = nn.Parameter(torch.empty(2, z))
        self.beta = nn.Parameter(torch.empty(2, z))

    def init_weights(self) -> None:
        """Set queries and keys nearly to zero, so that attention begins as a mean."""
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)

    @property
    def state_spec(self) -> dict[str, Tree]:
        """Of the average and the attention."""
        sizes = 1, self.gamma.shape[1], self.wh.in_features
        return {"ema": self.ema.state_spec, "attention": self.attention.state_spec(*sizes)}

    def forward(
        self, x: Tensor, state: dict[str, Tree] | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, dict[str, Tree]]:
        """x (B, L, D) to y (B, L, D), and the exit state."""
        entry, leaving = state or {}, {}
        n = self.norm(x)
        m, leaving["ema"] = self.ema(n, entry.get("ema"), boundaries)
        z = silu(self.wz(m))
        q, k = (z * gain + shift for gain, shift in zip(self.gamma, self.beta, strict=True))
        q, k, v = (t.unsqueeze(2) for t in (q * z.shape[-1] ** -0.5, k, silu(self.wv(n))))
        attention, leaving["attention"] = self.attention(q, k, v, entry.get("attention"), boundaries)
        candidate = silu(self.wc(m) + self.wh(silu_gate(self.wr(m), attention.squeeze(2))))
        return torch.lerp(x, candidate.to(x.dtype), torch.sigmoid(self.wu(m)).to(x.dtype)), leaving


class MegaBlock(nn.Module):
    """Attention, then a feed-forward network on the ordinary residual."""

    def __init__(self, config: MegaConfig):
        super().__init__()
        d, f = config.model_dim, config.ffn_hidden_dim
        self.mega = MovingAverageAttention(config)
        self.nffn = FeedForward(LayerNorm(d, config.norm_eps), d, f, False, None, init_bert, 0.0, 0.0, bias=True)

    @property
    def state_spec(self) -> Tree:
        """That of the attention."""
        return self.mega.state_spec

    def forward(
        self, x: Tensor, state: Sealed | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, Tree]:
        """x (B, L, D) and the entry state to (B, L, D) and the exit state."""
        y, leaving = self.mega(x, None if state is None else state.tree, boundaries)
        return self.nffn(y, y), leaving


class Mega(Decoder):
    """A MEGA, the language model, in its form of chunks; see Decoder."""

    config: MegaConfig
    config_class = MegaConfig

    def __init__(self, config: MegaConfig, activation_checkpointing: bool = False):
        output = Linear(config.model_dim, config.vocab_size, False, init_embedding)
        super().__init__(
            config,
            Embedding(config.vocab_size, config.model_dim, True, 0.0),
            (MegaBlock(config) for _ in range(config.num_layers)),
            Head(LayerNorm(config.model_dim, config.norm_eps), output),
            activation_checkpointing,
        )
