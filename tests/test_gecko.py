"""The whole Gecko, written out from its paper's formulas on the model's own parameters, judges the model.

One document, one token after another, in plain PyTorch: nothing here is the package's but the parameters.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.config import GECKO, LATER_GECKO

from .test_cut_invariant import build
from .test_model import compare_with_definition

B1, B2 = 0.999, 0.9999


def decay_norm(x, weight, bias, groups, eps):
    """x (L, D): statistics of each group that forget, corrected for their start at zero."""
    mean, var, rows = 0.0, 0.0, []
    for n, token in enumerate(x, 1):
        features = token.view(groups, -1)
        mean = B1 * mean + (1 - B1) * features.mean(1, keepdim=True)
        var = B2 * var + (1 - B2) * features.var(1, keepdim=True, unbiased=False)
        y = (features - mean / (1 - B1**n)) / torch.sqrt(var / (1 - B2**n) + eps)
        rows.append(y.flatten() * (weight + 1) + bias)
    return torch.stack(rows)


def moving_average(x, alpha, delta, theta, gamma):
    """x (L, D): complex states that turn and fade, read by gamma, and the input itself."""
    ndim = alpha.shape[1]
    a, d = torch.sigmoid(alpha[..., 0]), torch.sigmoid(delta[..., 0])
    phase = torch.sigmoid(theta[..., 0]) * torch.arange(1, ndim + 1).double() * 2 * math.pi / ndim
    turn, out = (1 - a * d) * torch.exp(1j * phase), torch.complex(gamma[..., 0], gamma[..., 1])
    h, rows = torch.zeros_like(turn), []
    for token in x:
        h = turn * h + a * token[:, None]
        rows.append((out * h).sum(1).real + token)
    return torch.stack(rows)


def rotated(x, base):
    """x (L, H, d): adjacent pairs turned by the position in the document."""
    length, _, d = x.shape
    angle = torch.arange(length).double()[:, None] * base ** (-torch.arange(0, d, 2).double() / d)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angle)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def sliding_attention(q, k, v, c):
    """A token sees its own chunk up to itself, and the whole chunk before."""
    rows = []
    for t in range(len(q)):
        seen = slice(max(0, (t // c - 1) * c), t + 1)
        weights = torch.einsum("hd,shd->hs", q[t], k[seen]).softmax(1)
        rows.append(torch.einsum("hs,she->he", weights, v[seen]))
    return torch.stack(rows)


def working_memory(q, k, v, c):
    """Chunk j reads the matrix of all chunks up to j - 2."""
    length, heads, _ = q.shape
    memory, total = v.new_zeros(heads, q.shape[2], v.shape[2]), None
    rows = []
    for start in range(0, length, c):
        if start >= 2 * c:
            old = slice(start - 2 * c, start - c)
            mass = k[old].logsumexp(0)  # of each feature, over time
            total_after = mass if total is None else torch.logaddexp(total, mass)
            rate = torch.exp(mass - total_after)[..., None]
            error = v[old] - torch.einsum("thd,hde->the", k[old].softmax(2), memory)
            update = torch.einsum("thd,the->hde", k[old].softmax(0), error)
            memory, total = memory + rate * (update - memory), total_after
        rows.append(torch.einsum("thd,hde->the", q[start : start + c].softmax(2), memory))
    return torch.cat(rows)


def gecko(w, c, tokens):
    """Logits (L, vocabulary) of one document: w parameters by name, c configuration."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def silu(x):
        return x * torch.sigmoid(x)

    def rms(x):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + c.norm_eps)

    x = w["embed.weight"][tokens]
    for i in range(c.num_layers):
        a, f = f"layers.{i}.mega", f"layers.{i}.nffn"
        tn = decay_norm(x, w[f"{a}.timenorm.weight"], w[f"{a}.timenorm.bias"], c.norm_num_groups, c.norm_eps)
        average = moving_average(tn, *(w[f"{a}.cema.{n}"] for n in ("alpha", "delta", "theta", "gamma")))
        mx = rms(average) * (w[f"{a}.rmsnorm.weight"] + 1)
        z = rms(linear(mx, f"{a}.wz").unflatten(-1, (c.num_heads, -1))).flatten(-2)
        scale = (w[f"{a}.gamma"] + 1) / math.sqrt(c.z_dim / c.num_heads)
        views = [(z * scale[n] + w[f"{a}.beta"][n]).unflatten(-1, (c.num_heads, -1)) for n in range(4)]
        v = silu(linear(tn, f"{a}.wv")).unflatten(-1, (c.num_heads, -1))
        near = sliding_attention(rotated(views[0], c.rope_base), rotated(views[1], c.rope_base), v, c.chunk_size)
        far = working_memory(views[2], views[3], v, c.chunk_size)
        branch = near.flatten(1) * silu(linear(mx, f"{a}.wr")) + far.flatten(1)
        y = x + linear(mx, f"{a}.wh1") + linear(branch, f"{a}.wh2")
        n = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, keepdim=True, unbiased=False) + c.norm_eps)
        n = n * (w[f"{f}.norm.weight"] + 1) + w[f"{f}.norm.bias"]
        x = y + linear(silu(linear(n, f"{f}.fc1")) * linear(n, f"{f}.fc3"), f"{f}.fc2")
    final = w["output.final_norm.weight"], w["output.final_norm.bias"]
    return linear(decay_norm(x, *final, c.norm_num_groups, c.norm_eps), "output.output")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 3e-4)])
def test_the_model_is_the_paper_s_with_all_gradients(dtype, tolerance):
    model = build(dtype, **{**GECKO, "chunk_size": 5, "num_heads": 2})
    judge = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    tokens = torch.randint(0, 30, (28,), generator=torch.Generator().manual_seed(0))
    logits = model(tokens[None])[0][0], gecko(judge, model.config, tokens)
    found = [
        torch.autograd.grad(F.cross_entropy(made[:-1], tokens[1:]), list(weights))
        for made, weights in zip(logits, (model.parameters(), judge.values()), strict=True)
    ]
    torch.testing.assert_close(logits[0].double(), logits[1], atol=tolerance, rtol=0)
    for name, actual, expected in zip(judge, *found, strict=True):
        assert expected.any(), name
        assert (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3) < tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize("changes", [{}, {"memory": "none", "attention": "chunk"}])
def test_the_later_form_is_its_definition_with_all_gradients(changes, dtype, tolerance):
    model = build(dtype, **{**LATER_GECKO, "chunk_size": 5, **changes})
    compare_with_definition(model, 28, tolerance)


def test_taps_weigh_about_the_same_at_the_start():
    torch.manual_seed(0)
    taps = Megalodon(ModelConfig.named("gecko_small", mixer="convolution")).layers[0].mega.convolutions["v"].weight
    assert taps.shape == (512, 4)
    assert taps.std().item() == pytest.approx(0.1, rel=0.1)
    assert (taps.softmax(1) - 0.25).abs().max() < 0.1


def test_the_named_sizes_are_geckos():
    for name in ("gecko7B", "gecko7.1B", "gecko_small", "gecko_tiny"):
        config = ModelConfig.named(name)
        choices = LATER_GECKO if name == "gecko7.1B" else GECKO
        assert {key: getattr(config, key) for key in choices} == choices


def test_a_gecko_calls_itself_one():
    for name, kind in (("tiny", "Megalodon"), ("gecko_tiny", "Gecko")):
        model = Megalodon(ModelConfig.named(name))
        assert model.summary == f"a {kind} of 2 layers, width 64 and chunks of 64"
