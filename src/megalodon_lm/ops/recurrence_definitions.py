"""Definitions of the recurrences of the baselines, as in reference.py: one token after another.

Every function takes the same arguments as the op of its name and returns the same values; run it in float64.
"""

import torch
from torch import Tensor

from .boundaries import Boundaries
from .reference import tokens_of_row


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """The K newest inputs of the document, the token among them, each times its tap."""
    batch, length, dim = x.shape
    before = weight.shape[1] - 1
    nothing = [x.new_zeros(dim)] * before
    rows, exits = [], []
    for b in range(batch):
        valid, starts = tokens_of_row(boundaries, b, length)
        seen = nothing if state is None else list(state[b])
        ys = []
        for t in range(valid):
            window = (nothing if starts[t] else seen) + [x[b, t]]
            y = (weight.t() * torch.stack(window)).sum(0)
            ys.append(y if bias is None else y + bias)
            seen = window[1:]
        rows.append(torch.stack(ys + [x.new_zeros(dim)] * (length - valid)))
        exits.append(torch.stack(seen))
    return torch.stack(rows), torch.stack(exits)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t; y_t = sum_n c_{t,n} h_{t,n} + skip x_t."""
    batch, length, _ = x.shape
    rows, exits = [], []
    for i in range(batch):
        valid, starts = tokens_of_row(boundaries, i, length)
        h = torch.zeros_like(a) if state is None else state[i]
        ys = []
        for t in range(valid):
            if starts[t]:
                h = torch.zeros_like(a)
            h = torch.exp(dt[i, t, :, None] * a) * h + (dt[i, t] * x[i, t])[:, None] * b[i, t]
            ys.append(h @ c[i, t] + skip * x[i, t])
        rows.append(torch.stack(ys + [torch.zeros_like(x[i, 0])] * (length - valid)))
        exits.append(h)
    return torch.stack(rows), torch.stack(exits)


def generalized_delta_rule(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(w_t) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t; y_t = r_t S_t."""
    batch, length, heads, width = k.shape
    rows, exits = [], []
    for row in range(batch):
        valid, starts = tokens_of_row(boundaries, row, length)
        none = v.new_zeros(heads, width, v.shape[-1])
        matrix = none if state is None else state[row]
        ys = []
        for t in range(valid):
            if starts[t]:
                matrix = none
            asked = torch.einsum("hk,hkv->hv", a[row, t], matrix)
            matrix = log_w[row, t].exp()[..., None] * matrix
            matrix = matrix + b[row, t, :, :, None] * asked[:, None] + k[row, t, :, :, None] * v[row, t, :, None]
            ys.append(torch.einsum("hk,hkv->hv", r[row, t], matrix))
        ys += [torch.zeros_like(v[row, 0])] * (length - valid)
        rows.append(torch.stack(ys))
        exits.append(matrix)
    return torch.stack(rows), torch.stack(exits)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T; y_t = S_t q_t; the state is S transposed."""
    batch, length, heads, dim = k.shape
    nothing, identity = v.new_zeros(heads, v.shape[-1], dim), torch.eye(dim, dtype=k.dtype)
    rows, exits = [], []
    for b in range(batch):
        valid, starts = tokens_of_row(boundaries, b, length)
        s = nothing if state is None else state[b].mT
        ys = []
        for t in range(valid):
            if starts[t]:
                s = nothing
            alpha, strength = log_decay[b, t].exp()[:, None, None], beta[b, t][:, None, None]
            key, value = k[b, t][:, None, :], v[b, t][:, :, None]
            s = alpha * s @ (identity - strength * key.mT @ key) + strength * value @ key
            ys.append((s @ q[b, t][:, :, None]).squeeze(-1))
        rows.append(torch.stack(ys + [torch.zeros_like(v[b, 0])] * (length - valid)))
        exits.append(s.mT)
    return torch.stack(rows), torch.stack(exits)


def state_space_duality(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    step: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = alpha_t S_{t-1} + step_t b_t x_t^T; y_t = S_t^T c_t + skip x_t."""
    batch, length, heads, _ = x.shape
    nothing = x.new_zeros(heads, b.shape[-1], x.shape[-1])
    rows, exits = [], []
    for row in range(batch):
        valid, starts = tokens_of_row(boundaries, row, length)
        s = nothing if state is None else state[row]
        ys = []
        for t in range(valid):
            if starts[t]:
                s = nothing
            into, out = (p[row, t].repeat_interleave(heads // b.shape[2], 0) for p in (b, c))  # (H, N)
            alpha, taken = log_decay[row, t].exp()[:, None, None], step[row, t][:, None] * x[row, t]
            s = alpha * s + into[:, :, None] * taken[:, None, :]
            ys.append(torch.einsum("hnp,hn->hp", s, out) + skip[:, None] * x[row, t])
        rows.append(torch.stack(ys + [torch.zeros_like(x[row, 0])] * (length - valid)))
        exits.append(s)
    return torch.stack(rows), torch.stack(exits)


def token_shift(
    x: Tensor, mix: Tensor, state: Tensor | None = None, boundaries: Boundaries | None = None
) -> tuple[Tensor, Tensor]:
    """y_{n,t} = x_t + mix_n (x_{t-1} - x_t)."""
    batch, length, dim = x.shape
    rows, exits = [], []
    for b in range(batch):
        valid, starts = tokens_of_row(boundaries, b, length)
        before = x.new_zeros(dim) if state is None else state[b]
        ys = []
        for t in range(valid):
            if starts[t]:
                before = x.new_zeros(dim)
            ys.append(x[b, t] + mix * (before - x[b, t]))
            before = x[b, t]
        rows.append(torch.stack(ys + [torch.zeros_like(mix)] * (length - valid), 1))
        exits.append(before)
    return torch.stack(rows, 1), torch.stack(exits)
