"""The shortest correct definition of every op: the ground truth of the tests.

One token after another, one document after another, nothing clever. Every function takes the same arguments as its
fast counterpart and returns the same values; run it in float64. Sources: Ma et al. 2024 (arXiv 2404.08801), Ma et al.
2026 (arXiv 2601.06463) and the authors' released code; docs/model.md lists where the two differ.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .adaptive_memory import MemoryState, ValueCache
from .boundaries import Boundaries
from .chunk_attention import KeyValueCache
from .decay_norm import MEAN_DECAY, VAR_DECAY
from .local_attention import LocalCache
from .rotary import Base
from .sliding_attention import SlidingCache
from .timestep_norm import NormState


def tokens_of_row(boundaries: Boundaries | None, row: int, length: int) -> tuple[int, list[bool]]:
    """Number of valid tokens of a row and, for each of them, whether a document starts there."""
    if boundaries is None:
        return length, [False] * length
    valid = length if boundaries.lengths is None else int(boundaries.lengths[row])
    starts = [False] * valid if boundaries.starts is None else boundaries.starts[row, :valid].tolist()
    return valid, starts


def cema_coefficients(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p (D, N) real, q and g (D, N) complex from alpha, delta (D, N, 1), theta (D, 1, 1), gamma (D, N, 2)."""
    dim, ndim, _ = alpha.shape
    p, q, g = [], [], []
    for d in range(dim):
        for n in range(ndim):
            a, s = torch.sigmoid(alpha[d, n, 0]), torch.sigmoid(delta[d, n, 0])
            phi = (n + 1) * torch.sigmoid(theta[d, 0, 0]) * 2 * math.pi / ndim
            p.append(a)
            q.append(torch.polar(1 - a * s, phi))
            g.append(torch.complex(gamma[d, n, 0], gamma[d, n, 1]) / math.sqrt(ndim))
    return tuple(torch.stack(c).view(dim, ndim) for c in (p, q, g))  # type: ignore[return-value]


def cema(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    g: Tensor,
    omega: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = q h_{t-1} + p x_t; y_t = Re(sum_n g_n h_{t,n}) + omega x_t."""
    batch, length, _ = x.shape
    rows, exits = [], []
    for b in range(batch):
        valid, starts = tokens_of_row(boundaries, b, length)
        h = torch.view_as_complex(state[b]) if state is not None else torch.zeros_like(q)
        ys = []
        for t in range(valid):
            if starts[t]:
                h = torch.zeros_like(q)
            h = q * h + p * x[b, t, :, None]
            ys.append((g * h).sum(-1).real + omega * x[b, t])
        ys += [torch.zeros_like(x[b, 0])] * (length - valid)
        rows.append(torch.stack(ys))
        exits.append(torch.view_as_real(h))
    return torch.stack(rows), torch.stack(exits)


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: NormState | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, NormState]:
    """Merge each token's group moments, as one token, into the running ones; normalise with the merged ones."""

    def take(n: int, mean: Tensor, var: Tensor, gm: Tensor, gv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d = gm - mean
        mean = mean + d / n
        var = (n - 1) / n * var + gv / n + (n - 1) / n**2 * d**2
        return mean, var, mean, var

    return _norm_over_time(take, x, weight, bias, num_groups, eps, state, boundaries)


def decay_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: NormState | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, NormState]:
    """Take each token's group moments into moving averages; normalise with these, corrected for their zero start."""

    def take(n: int, mean: Tensor, var: Tensor, gm: Tensor, gv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean = MEAN_DECAY * mean + (1 - MEAN_DECAY) * gm
        var = VAR_DECAY * var + (1 - VAR_DECAY) * gv
        kept, spread = (-math.expm1(n * math.log(decay)) for decay in (MEAN_DECAY, VAR_DECAY))
        return mean, var, mean / kept, var / spread

    return _norm_over_time(take, x, weight, bias, num_groups, eps, state, boundaries)


def _norm_over_time(
    take: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    state: NormState | None,
    boundaries: Boundaries | None,
) -> tuple[Tensor, NormState]:
    """`take` makes of n, the statistics and a token's moments the next statistics, and what to normalise with."""
    batch, length, dim = x.shape
    zero = torch.zeros(num_groups, dtype=torch.float64)
    rows, counts, means, variances = [], [], [], []
    for b in range(batch):
        valid, starts = tokens_of_row(boundaries, b, length)
        n, mean, var = (0, zero, zero) if state is None else (int(state.count[b]), state.mean[b], state.var[b])
        ys = []
        for t in range(valid):
            if starts[t] or n == 0:
                n, mean, var = 0, zero, zero
            token = x[b, t].view(num_groups, -1)
            n += 1
            moments = token.mean(-1).double(), token.var(-1, unbiased=False).double()
            mean, var, centre, variance = take(n, mean, var, *moments)
            y = (token - centre[:, None]) / torch.sqrt(variance[:, None] + eps)
            ys.append((y.reshape(dim) * (weight + 1) + bias).to(x.dtype))
        ys += [torch.zeros_like(x[b, 0])] * (length - valid)
        rows.append(torch.stack(ys))
        counts.append(n)
        means.append(mean)
        variances.append(var)
    return torch.stack(rows), NormState(torch.tensor(counts), torch.stack(means), torch.stack(variances))


def rope(x: Tensor, slot: int, base: Base, heads_without_rope: int = 0) -> Tensor:
    """Rotate the adjacent pairs (2i, 2i+1) of x (H, d) by slot * base^(-2i/d), but those of the last heads."""
    d, heads = x.shape[-1], len(x) - heads_without_rope
    pairs = []
    for i in range(d // 2):
        angle = slot * (base[i] if isinstance(base, tuple) else base ** (-2 * i / d))
        even, odd = x[:heads, 2 * i], x[:heads, 2 * i + 1]
        pairs += [even * math.cos(angle) - odd * math.sin(angle), even * math.sin(angle) + odd * math.cos(angle)]
    return torch.cat([torch.stack(pairs, -1), x[heads:]])


def _attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Softmax attention of a token (H, dk) to some (H, dk) with values (H, dv), with scale 1."""
    scores = torch.einsum("hd,shd->hs", query, torch.stack(keys))
    return torch.einsum("hs,she->he", scores.softmax(-1), torch.stack(values))


def _filled_up(tokens: list[Tensor], size: int, like: Tensor) -> Tensor:
    """Keys or values of some tokens, and zeros up to `size`."""
    return torch.stack(tokens + [torch.zeros_like(like)] * (size - len(tokens)))


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    rope_base: float,
    cache: KeyValueCache | None = None,
    boundaries: Boundaries | None = None,
    heads_without_rope: int = 0,
) -> tuple[Tensor, KeyValueCache]:
    """A token sees the tokens of its own chunk up to itself; chunks and RoPE restart at each document."""
    batch, length = q.shape[:2]
    rows, keys, values, fills = [], [], [], []
    for b in range(batch):
        valid, starts = tokens_of_row(boundaries, b, length)
        seen_k: list[Tensor] = []
        seen_v: list[Tensor] = []
        if cache is not None:
            seen_k, seen_v = (list(c[b, : int(cache.fill[b])]) for c in (cache.keys, cache.values))
        out = []
        for t in range(valid):
            if starts[t] or len(seen_k) == chunk_size:
                seen_k, seen_v = [], []
            slot = len(seen_k)
            seen_k.append(rope(k[b, t], slot, rope_base, heads_without_rope))
            seen_v.append(v[b, t])
            query = rope(q[b, t], slot, rope_base, heads_without_rope)
            out.append(_attend(query, seen_k, seen_v))
        out += [torch.zeros_like(v[b, 0])] * (length - valid)
        rows.append(torch.stack(out))
        if len(seen_k) == chunk_size:
            seen_k, seen_v = [], []
        keys.append(_filled_up(seen_k, chunk_size, k[b, 0]))
        values.append(_filled_up(seen_v, chunk_size, v[b, 0]))
        fills.append(len(seen_k))
    return torch.stack(rows), KeyValueCache(torch.stack(keys), torch.stack(values), torch.tensor(fills))


def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    rope_base: float,
    cache: SlidingCache | None = None,
    boundaries: Boundaries | None = None,
    heads_without_rope: int = 0,
) -> tuple[Tensor, SlidingCache]:
    """A token sees its own chunk up to itself, and all of the chunk before; both and RoPE restart at each document."""

    def kept(position: int, seen: list[Tensor]) -> list[Tensor]:
        return seen if position % chunk_size else seen[-chunk_size:]

    out, *leaving = _attention_in_documents(
        kept, 2 * chunk_size, q, k, v, rope_base, cache, boundaries, heads_without_rope
    )
    return out, SlidingCache(*leaving)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    rope_base: Base,
    cache: LocalCache | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, LocalCache]:
    """A token sees the last `window` tokens of its document, itself counted; RoPE restarts at each document."""

    def kept(position: int, seen: list[Tensor]) -> list[Tensor]:
        return seen[max(0, len(seen) - window + 1) :]

    out, *leaving = _attention_in_documents(kept, window, q, k, v, rope_base, cache, boundaries)
    return out, LocalCache(*leaving)


def _attention_in_documents(
    kept: Callable[[int, list[Tensor]], list[Tensor]],
    size: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_base: Base,
    cache: SlidingCache | LocalCache | None,
    boundaries: Boundaries | None,
    heads_without_rope: int = 0,
) -> tuple[Tensor, ...]:
    """Attention to itself and what is `kept` after each token, by how many there were and what was seen so far."""
    batch, length = q.shape[:2]
    rows, keys, values, fills, positions = [], [], [], [], []
    for b in range(batch):
        valid, starts = tokens_of_row(boundaries, b, length)
        position, seen_k, seen_v = 0, [], []
        if cache is not None:
            position = int(cache.position[b])
            seen_k, seen_v = (list(c[b, : int(cache.fill[b])]) for c in (cache.keys, cache.values))
        out = []
        for t in range(valid):
            if starts[t]:
                position, seen_k, seen_v = 0, [], []
            seen_k.append(rope(k[b, t], position, rope_base, heads_without_rope))
            seen_v.append(v[b, t])
            out.append(_attend(rope(q[b, t], position, rope_base, heads_without_rope), seen_k, seen_v))
            position += 1
            seen_k, seen_v = kept(position, seen_k), kept(position, seen_v)
        out += [torch.zeros_like(v[b, 0])] * (length - valid)
        rows.append(torch.stack(out))
        keys.append(_filled_up(seen_k, size, k[b, 0]))
        values.append(_filled_up(seen_v, size, v[b, 0]))
        fills.append(len(seen_k))
        positions.append(position)
    leaving = (torch.stack(keys), torch.stack(values), torch.tensor(fills), torch.tensor(positions))
    return torch.stack(rows), *leaving


def adaptive_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    lag: int,
    state: MemoryState | None = None,
    cache: ValueCache | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, MemoryState]:
    """A token reads the memory its document had `lag` chunks before; a chunk is absorbed when it is complete."""
    batch, length, heads, dim = k.shape
    none = v.new_zeros(heads, dim, v.shape[-1])
    rows, exits = [], []
    for b in range(batch):
        valid, starts = tokens_of_row(boundaries, b, length)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        memories, log_sum, chunks = [none] * lag, k.new_zeros(heads, dim), 0
        if state is not None:
            fill, chunks = int(state.fill[b]), int(state.chunks[b])
            keys, memories, log_sum = list(state.keys[b, :fill]), list(state.memory[b]), state.log_sum[b]
            if fill:
                assert cache is not None
                end = int(cache.fill[b])
                values = list(cache.values[b, end - fill : end])
        out = []
        for t in range(valid):
            if starts[t]:
                keys, values = [], []
                memories, log_sum, chunks = [none] * lag, k.new_zeros(heads, dim), 0
            read = torch.einsum("hk,hkv->hv", q[b, t].softmax(-1), memories[0])
            out.append(read if chunks >= lag else torch.zeros_like(v[b, t]))
            keys.append(k[b, t])
            values.append(v[b, t])
            if len(keys) == chunk_size:
                ks, vs = torch.stack(keys), torch.stack(values)
                own = ks.logsumexp(0)
                if chunks == 0:
                    log_sum, update = own, torch.einsum("thk,thv->hkv", ks.softmax(0), vs)
                else:
                    log_sum = torch.logaddexp(log_sum, own)
                    rho = torch.exp(own - log_sum)[..., None]
                    wrong = vs - torch.einsum("thk,hkv->thv", ks.softmax(-1), memories[-1])
                    update = torch.einsum("thk,thv->hkv", ks.softmax(0), wrong)
                    update = memories[-1] + rho * (update - memories[-1])
                memories = [*memories[1:], update]
                keys, values, chunks = [], [], chunks + 1
        rows.append(torch.stack(out + [torch.zeros_like(v[b, 0])] * (length - valid)))
        held = torch.stack(keys + [torch.zeros_like(k[b, 0])] * (chunk_size - len(keys)))
        exits.append((held, torch.tensor(len(keys)), torch.stack(memories), log_sum, torch.tensor(chunks)))
    return torch.stack(rows), MemoryState(*(torch.stack(part) for part in zip(*exits, strict=True)))


def head_rms_norm(z: Tensor, num_heads: int, eps: float = 1e-5) -> Tensor:
    """Divide each head's slice of the last dimension by its root mean square; no scale."""
    heads = [h / torch.sqrt((h * h).mean(-1, keepdim=True) + eps) for h in z.chunk(num_heads, -1)]
    return torch.cat(heads, -1)
