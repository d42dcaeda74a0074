"""As reference.py, for the ops of the encoder: one row after another, dense, nothing clever; run it in float64."""

import math

import torch
from torch import Tensor

from .bidirectional_cema import Coefficients
from .boundaries import Boundaries
from .reference import rope, tokens_of_row


def bidirectional_cema(
    x: Tensor, before: Coefficients, after: Coefficients, omega: Tensor, boundaries: Boundaries | None = None
) -> Tensor:
    """The whole matrix of each channel: its lower triangle from one set of coefficients, above it from the other."""
    batch, length, dim = x.shape
    rows = []
    for b in range(batch):
        valid, _ = tokens_of_row(boundaries, b, length)
        channels = []
        for d in range(dim):
            matrix = []
            for t in range(length):
                for s in range(length):
                    if t >= valid or s >= valid:
                        matrix.append(x.new_zeros(()))
                        continue
                    (p, q, g), lag = (before, t - s) if s <= t else (after, s - t - 1)
                    weight = (p[d] * g[d] * q[d] ** lag).sum().real
                    matrix.append(weight + omega[d] if s == t else weight)
            channels.append(torch.stack(matrix).view(length, length) @ x[b, :, d])
        rows.append(torch.stack(channels, -1))
    return torch.stack(rows)


def sequence_norm(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5, boundaries: Boundaries | None = None
) -> Tensor:
    """Each group of features over the valid steps of its row."""
    rows = []
    for b in range(len(x)):
        valid, _ = tokens_of_row(boundaries, b, x.shape[1])
        groups = []
        for scalars in x[b, :valid].chunk(num_groups, -1):
            var = scalars.var(unbiased=False) if valid else x.new_ones(())
            groups.append((scalars - scalars.mean()) / torch.sqrt(var + eps))
        y = torch.cat(groups, -1) * (weight + 1) + bias
        rows.append(torch.cat([y, x.new_zeros(x.shape[1] - valid, x.shape[2])]))
    return torch.stack(rows)


def bidirectional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    rope_base: float,
    kind: str = "softmax",
    boundaries: Boundaries | None = None,
) -> Tensor:
    """A step sees all valid steps of its chunk."""
    mu, sigma = math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi))
    batch, length = q.shape[:2]
    size = chunk_size or length
    rows = []
    for b in range(batch):
        valid, _ = tokens_of_row(boundaries, b, length)
        out = []
        for t in range(valid):
            start = t // size * size
            seen = range(start, min(start + size, valid))
            query = rope(q[b, t], t - start, rope_base)
            keys = torch.stack([rope(k[b, s], s - start, rope_base) for s in seen])
            scores = torch.einsum("hd,shd->hs", query, keys)
            if kind == "softmax":
                weights = scores.softmax(-1)
            else:
                weights = 0.5 * (1 + torch.erf((scores / len(seen) - mu) / (sigma * math.sqrt(2))))
            out.append(torch.einsum("hs,she->he", weights, v[b, start : start + len(seen)]))
        rows.append(torch.stack(out + [torch.zeros_like(v[b, 0])] * (length - valid)))
    return torch.stack(rows)
