"""The blocks of RWKV-7: mixing of tokens by a delta rule, and of channels; see baselines/rwkv7.py.

Parameters have the names of the authors' code, where it has one for them, and begin as there.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.linear import Linear
from ..layers.norms import AffineNorm, LayerNorm
from ..ops.boundaries import Boundaries
from ..ops.generalized_delta_rule import generalized_delta_rule
from ..ops.norms import layer_norm
from ..ops.token_shift import token_shift
from ..state_spec import Sealed, Tree, declare

NORM_EPS = 1e-5
_STRONGEST = -math.exp(-0.5)  # logarithm of the decay that a sigmoid of 1 gives


def low_rank_widths(dim: int) -> tuple[int, int, int, int]:
    """Widths inside the low-rank maps of w, a, v and g, as the authors advise: about c sqrt(D), in steps of 32."""
    w, a, v, g = (max(32, round(factor * math.sqrt(dim) / 32) * 32) for factor in (2.5, 2.5, 1.7, 5))
    return w, a, v, g


class LowRank(nn.Module):
    """act(x down) up, which is zero at the start.

    Args:
        dim: D of x and of the result.
        rank: width between them.
        act: inside; None for nothing.
    """

    spared: ClassVar[tuple[str, ...]] = ("down", "up")

    def __init__(self, dim: int, rank: int, act: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.act = act
        self.down = nn.Parameter(torch.empty(dim, rank))
        self.up = nn.Parameter(torch.empty(rank, dim))

    def init_weights(self) -> None:
        """Zero and a tenth of an orthogonal map."""
        nn.init.zeros_(self.down)
        nn.init.orthogonal_(self.up, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        inside = x @ self.down
        return (inside if self.act is None else self.act(inside)) @ self.up


class HeadNorm(AffineNorm):
    """(x - mean) / std * (weight + 1) + bias with the mean and deviation of each head's features."""

    def __init__(self, dim: int, head_dim: int, scale: float):
        super().__init__(dim, head_dim * NORM_EPS)
        self.head_dim, self.scale = head_dim, scale

    def init_weights(self) -> None:
        """Smaller in the lower blocks."""
        super().init_weights()
        nn.init.constant_(self.weight, self.scale - 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, H, V) to (B, L, H, V), in float32 or better."""
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=self.eps)
        weight, bias = (t.to(wide).view(x.shape[-2:]) for t in (self.weight, self.bias))
        return torch.addcmul(bias, normed, weight + 1)


class TimeMixing(nn.Module):
    """What a token takes from its past; see docs/baselines.md for the formulas.

    Its state is a dict of "shift", the token before, and "matrix".

    Args:
        dim: D.
        head_dim: K.
        index: of the block, from 0; the first one gives its values to the later ones.
        depth: number of blocks.
    """

    spared: ClassVar[tuple[str, ...]] = ("mix", "w0", "a0", "v0", "k_k", "k_a", "r_k")

    def __init__(self, dim: int, head_dim: int, index: int, depth: int):
        super().__init__()
        self.head_dim, self.index, self.depth = head_dim, index, depth
        self.mix = nn.Parameter(torch.empty(6, dim))  # of r, w, k, v, a, g
        self.w0, self.a0, self.k_k, self.k_a, self.r_k = (nn.Parameter(torch.empty(dim)) for _ in range(5))
        self.v0 = nn.Parameter(torch.empty(dim)) if index else None
        w, a, v, g = low_rank_widths(dim)
        self.w = LowRank(dim, w, torch.tanh)
        self.a = LowRank(dim, a)
        self.v = LowRank(dim, v) if index else None
        self.g = LowRank(dim, g, torch.sigmoid)
        self.receptance = Linear(dim, dim, False, nn.init.orthogonal_)
        self.key = Linear(dim, dim, False, partial(nn.init.orthogonal_, gain=0.1))
        self.value = Linear(dim, dim, False, nn.init.orthogonal_)
        self.output = Linear(dim, dim, False, nn.init.zeros_)
        self.ln_x = HeadNorm(dim, head_dim, ((index + 1) / depth) ** 0.7)

    @torch.no_grad()
    def init_weights(self) -> None:
        """All that is not a matrix."""
        dim = self.mix.shape[1]
        feature = torch.arange(dim, dtype=torch.float32, device=self.mix.device)
        fade = 1 - self.index / self.depth
        for row, power in zip(self.mix, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            row.copy_(1 - (feature / dim) ** (power * fade))
        part = feature / max(dim - 1, 1)
        zigzag = (feature % self.head_dim) / ((self.head_dim - 1) / 2) - 1  # -1 to 1 over each head
        zigzag = zigzag * zigzag.abs()
        bend = 1 + (self.index / max(self.depth - 1, 1)) ** 0.3
        self.w0.copy_(-5.5 + 6 * part**bend + 2.5 * zigzag)
        self.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * (part - 0.5))
        if self.v0 is not None:
            self.v0.copy_(0.73 - 0.4 * (part - 0.5))
        self.k_k.copy_(0.71 - 0.1 * (part - 0.5))
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)

    @property
    def state_spec(self) -> dict[str, Any]:
        """The token before (D,), and (H, K, K) in float32 or better."""
        dim, width = self.mix.shape[1], self.head_dim
        return {"shift": declare(dim), "matrix": declare(dim // width, width, width, dtype=torch.float32)}

    def forward(
        self,
        x: Tensor,
        first: Tensor | None,
        state: dict[str, Tensor] | None = None,
        boundaries: Boundaries | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x (B, L, D) and the values of the first block, None for that one itself, to both of the same and the exit."""
        entry = state or {}
        wide = torch.promote_types(x.dtype, torch.float32)
        (xr, xw, xk, xv, xa, xg), shift = token_shift(x, self.mix, entry.get("shift"), boundaries)
        r, k, v = (t.to(wide) for t in (self.receptance(xr), self.key(xk), self.value(xv)))
        if self.v is not None and self.v0 is not None and first is not None:
            v = v.lerp(first, torch.sigmoid(self.v0.to(wide) + self.v(xv)))
        log_w = _STRONGEST * torch.sigmoid(self.w0.to(wide) + self.w(xw))
        rate = torch.sigmoid(self.a0.to(wide) + self.a(xa))
        kappa = F.normalize(self._heads(k * self.k_k.to(wide)), dim=-1)
        k = k * (1 + (rate - 1) * self.k_a.to(wide))

        r, k, values, rates = (self._heads(t) for t in (r, k, v, rate))
        given = r, self._heads(log_w), k, values, -kappa, kappa * rates
        y, matrix = generalized_delta_rule(*given, entry.get("matrix"), boundaries)
        bonus = (r * k * self.r_k.to(wide).view(r.shape[-2:])).sum(-1, keepdim=True)
        y = torch.addcmul(self.ln_x(y), bonus, values).flatten(-2)
        made = self.output((y * self.g(xg)).to(x.dtype))
        return made, v if first is None else first, {"shift": shift, "matrix": matrix}

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, self.head_dim))


class ChannelMixing(nn.Module):
    """value(relu(key(x mixed with the token before))^2). Its state is that token.

    Args:
        dim: D.
        hidden_dim: F.
        index, depth: of the block, and of all.
    """

    spared: ClassVar[tuple[str, ...]] = ("mix",)

    def __init__(self, dim: int, hidden_dim: int, index: int, depth: int):
        super().__init__()
        self.power = (1 - index / depth) ** 4
        self.mix = nn.Parameter(torch.empty(1, dim))
        self.key = Linear(dim, hidden_dim, False, nn.init.orthogonal_)
        self.value = Linear(hidden_dim, dim, False, nn.init.zeros_)

    @torch.no_grad()
    def init_weights(self) -> None:
        """How much is of the token before."""
        dim = self.mix.shape[1]
        self.mix.copy_(1 - (torch.arange(dim, dtype=torch.float32, device=self.mix.device) / dim) ** self.power)

    @property
    def state_spec(self) -> Any:
        """The token before (D,)."""
        return declare(self.mix.shape[1])

    def forward(
        self, x: Tensor, state: Tensor | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D) to (B, L, D)."""
        (mixed,), leaving = token_shift(x, self.mix, state, boundaries)
        return self.value(F.relu(self.key(mixed)).square()), leaving


class Rwkv7Block(nn.Module):
    """Both mixings, each on a LayerNorm and added to the stream; the first block begins with another LayerNorm."""

    def __init__(self, dim: int, head_dim: int, hidden_dim: int, index: int, depth: int):
        super().__init__()
        self.ln0 = None if index else LayerNorm(dim, NORM_EPS)
        self.ln1 = LayerNorm(dim, NORM_EPS)
        self.ln2 = LayerNorm(dim, NORM_EPS)
        self.att = TimeMixing(dim, head_dim, index, depth)
        self.ffn = ChannelMixing(dim, hidden_dim, index, depth)

    @property
    def state_spec(self) -> Tree:
        """That of its mixings."""
        return {"att": self.att.state_spec, "ffn": self.ffn.state_spec}

    def forward(
        self, x: Tensor, first: Tensor | None, state: Sealed | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, Tensor, Tree]:
        """x (B, L, D), the values of the first block (None in itself) and the entry state to the same three."""
        entry = {"att": None, "ffn": None} if state is None else state.tree
        if self.ln0 is not None:
            x = layer_norm(x, self.ln0.weight, self.ln0.bias, NORM_EPS, out_dtype=x.dtype)  # the stream stays wide
        made, first, att = self.att(self.ln1(x), first, entry["att"], boundaries)
        x = x + made
        made, ffn = self.ffn(self.ln2(x), entry["ffn"], boundaries)
        return x + made, first, {"att": att, "ffn": ffn}
