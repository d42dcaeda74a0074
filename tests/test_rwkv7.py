import math

import pytest
import torch

from megalodon_lm.baselines.rwkv7 import Rwkv7, Rwkv7Config
from megalodon_lm.baselines.rwkv7_blocks import Rwkv7Block
from megalodon_lm.state_spec import Sealed, named, tree_map

from .ops.cases import assert_close, boundaries

DIM, HEAD, HIDDEN, DEPTH = 32, 16, 48, 3


def blocks(dtype=torch.float64, seed=0):
    """A stack of blocks with random parameters: those at the start would hide most of what there is."""
    torch.manual_seed(seed)
    stack = torch.nn.ModuleList(Rwkv7Block(DIM, HEAD, HIDDEN, i, DEPTH) for i in range(DEPTH)).to(dtype)
    for p in stack.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return stack


def read(stack, x, states=None, where=None):
    """Output of the stack, and its exit states."""
    first, leaving = None, []
    for i, block in enumerate(stack):
        x, first, state = block(x, first, None if states is None else Sealed(states[i]), where)
        leaving.append(state)
    return x, tuple(leaving)


def empty(stack, batch, dtype=torch.float64):
    return tuple(tree_map(lambda leaf: leaf.empty(batch, "cpu", dtype), block.state_spec) for block in stack)


def layer_norm(x, norm):
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * (1 + norm.weight) + norm.bias


def token_through(block, x, first, state):
    """RWKV-7 for one token (D,) of one document, as the paper writes it: one head after another."""
    att, ffn = block.att, block.ffn
    if block.ln0 is not None:
        x = layer_norm(x, block.ln0)
    n = layer_norm(x, block.ln1)
    xr, xw, xk, xv, xa, xg = (n + (state["att"]["shift"] - n) * mix for mix in att.mix)
    r, k, v = att.receptance.weight @ xr, att.key.weight @ xk, att.value.weight @ xv
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(att.w0 + torch.tanh(xw @ att.w.down) @ att.w.up))
    rate = torch.sigmoid(att.a0 + xa @ att.a.down @ att.a.up)
    gate = torch.sigmoid(xg @ att.g.down) @ att.g.up
    if first is None:
        first = v
    else:
        v = v + (first - v) * torch.sigmoid(att.v0 + xv @ att.v.down @ att.v.up)
    kappa, k = k * att.k_k, k * (1 + (rate - 1) * att.k_a)
    out, matrices = [], []
    for h, matrix in enumerate(state["att"]["matrix"]):
        own = slice(h * HEAD, (h + 1) * HEAD)
        unit = kappa[own] / kappa[own].norm()
        turn = torch.diag(w[own]) - torch.outer(rate[own] * unit, unit)
        matrix = turn @ matrix + torch.outer(k[own], v[own])
        y = r[own] @ matrix
        y = (y - y.mean()) / (y.var(unbiased=False) + HEAD * 1e-5).sqrt()
        y = y * (1 + att.ln_x.weight[own]) + att.ln_x.bias[own]
        out.append(y + (r[own] * k[own] * att.r_k[own]).sum() * v[own])
        matrices.append(matrix)
    x = x + att.output.weight @ (torch.cat(out) * gate)
    m = layer_norm(x, block.ln2)
    mixed = m + (state["ffn"] - m) * ffn.mix[0]
    x = x + ffn.value.weight @ torch.relu(ffn.key.weight @ mixed) ** 2
    return x, first, {"att": {"shift": n, "matrix": torch.stack(matrices)}, "ffn": m}


def definition(stack, x, states, where):
    """Token by token through all blocks, the state being all that is carried."""
    rows, exits = [], []
    for b in range(len(x)):
        state = [tree_map(lambda t: t[b], s) for s in states]  # noqa: B023
        valid = x.shape[1] if where is None or where.lengths is None else int(where.lengths[b])
        out = []
        for t in range(valid):
            if where is not None and where.starts is not None and where.starts[b, t]:
                state = [tree_map(torch.zeros_like, s) for s in state]
            y, first = x[b, t], None
            for i, block in enumerate(stack):
                y, first, state[i] = token_through(block, y, first, state[i])
            out.append(y)
        rows.append(torch.stack(out) if out else x.new_zeros(0, DIM))
        exits.append(state)
    return rows, tuple(tree_map(lambda *ts: torch.stack(ts), *(e[i] for e in exits)) for i in range(len(stack)))


def leaves(states):
    return [t for state in states for _, t in named(state)]


def test_equals_the_recurrence_of_the_paper_with_all_gradients():
    batch, length = 3, 21
    stack, where = blocks(), boundaries("both", batch, length)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, length, DIM, generator=g, dtype=torch.float64, requires_grad=True)
    entry = tree_map(
        lambda t: torch.randn(t.shape, generator=g, dtype=t.dtype, requires_grad=True), empty(stack, batch)
    )
    found, expected = read(stack, x, entry, where), definition(stack, x, entry, where)
    out = [row[:n] for row, n in zip(found[0], where.lengths, strict=True)]
    assert_close(out + leaves(found[1]), expected[0] + leaves(expected[1]), 1e-10)
    inputs, grads = [x, *leaves(entry), *stack.parameters()], []
    for y, states in ((out, found[1]), (expected[0], expected[1])):
        torch.manual_seed(2)
        total = sum((t * torch.randn_like(t)).sum() for t in [*y, *leaves(states)])
        grads.append(torch.autograd.grad(total, inputs))
    assert all(g.any() for g in grads[1])
    assert_close(*grads, 1e-9)


def test_first_block_alone_decides_the_values_that_later_ones_add():
    stack, x = blocks(), torch.randn(2, 9, DIM, dtype=torch.float64)
    plain, _ = read(stack, x)
    for block in stack[1:]:
        torch.nn.init.constant_(block.att.v0, -1e3)  # nothing of the first block's
    assert not torch.allclose(read(stack, x)[0], plain)


def test_initial_values_are_those_of_the_authors():
    """Blocks begin as the identity; decays spread over (0.545, 1), slow ones first; norms of lower blocks are small."""
    torch.manual_seed(0)
    stack = [Rwkv7Block(64, 32, 256, i, 6) for i in range(6)]
    for block in stack:
        for part in block.modules():
            getattr(part, "init_weights", lambda: None)()
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(stack[1](x, torch.zeros(2, 5, 64))[0], x)
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(stack[0].att.w0.detach()))
    assert 0.95 < decay[0] < 1
    assert 0.545 < decay[-1] < 0.6
    scales = [1 + block.att.ln_x.weight[0].item() for block in stack]
    assert scales == pytest.approx([((i + 1) / 6) ** 0.7 for i in range(6)])
    assert all(block.att.mix.min().item() >= 0 and block.att.mix.max().item() == 1 for block in stack)


def test_activation_checkpointing_changes_nothing():
    model = Rwkv7(Rwkv7Config(vocab_size=32, num_layers=DEPTH, model_dim=DIM, head_dim=HEAD, ffn_hidden_dim=HIDDEN))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens, grads = torch.arange(20)[None], []
    for model.activation_checkpointing in (False, True):
        loss, state = model(tokens, targets=tokens)
        grads.append(torch.autograd.grad(loss + state.parts["layers"][1]["att"]["matrix"].sum(), [*model.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("weights", [False, True], ids=["autocast", "weights"])
def test_bf16_stays_near_float32(weights):
    stack = blocks(torch.float32)
    for p in stack.parameters():
        p.data.mul_(0.5).copy_(p.data.bfloat16())
    x = torch.randn(2, 70, DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact, states = read(stack, x.float())
    if weights:
        rough, found = read(stack.bfloat16(), x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            rough, found = read(stack, x.float())
        assert rough.dtype == torch.float32  # the residual stream
    assert all(state["att"]["matrix"].dtype == torch.float32 for state in found)
    assert_close([rough.float(), *leaves(found)], [exact, *leaves(states)], 5e-2)
