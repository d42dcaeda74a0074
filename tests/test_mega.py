"""MEGA against a loop over tokens in float64."""

import math

import pytest
import torch

from megalodon_lm.architectures import build, config_of
from megalodon_lm.baselines.mega import Mega, MegaBlock, MegaConfig
from megalodon_lm.errors import InputError
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.reference import rope
from megalodon_lm.state_spec import Sealed

from .ops.cases import assert_close

CONFIG = MegaConfig(num_layers=2, model_dim=6, z_dim=4, value_dim=5, ffn_hidden_dim=7, ema_ndim=3, chunk_size=4)


def layer_norm(norm, x):
    centred = x - x.mean()
    return centred / torch.sqrt((centred * centred).mean() + norm.eps) * (norm.weight + 1) + norm.bias


def silu(x):
    return x / (1 + torch.exp(-x))


def definition(block, x, starts):
    """One row (L, D) through a block, token by token, and its average's states (D, N) at the exit."""
    m = block.mega
    p, d = (1 / (1 + torch.exp(-t.squeeze(-1))) for t in (m.ema.alpha, m.ema.delta))
    beta, gamma = m.ema.beta.squeeze(-1), m.ema.gamma.squeeze(-1) / math.sqrt(CONFIG.ema_ndim)
    h, keys, values, out = torch.zeros_like(p), [], [], []
    for t in range(len(x)):
        if starts[t]:
            h, keys, values = torch.zeros_like(p), [], []
        if len(keys) == CONFIG.chunk_size:
            keys, values = [], []
        n = layer_norm(m.norm, x[t])
        h = (1 - p * d) * h + p * beta * n[:, None]
        mx = silu((gamma * h).sum(-1) + m.ema.omega.squeeze(-1) * n)
        z = silu(m.wz.weight @ mx + m.wz.bias)
        slot = len(keys)
        q, k = (rope((z * m.gamma[i] + m.beta[i])[None], slot, CONFIG.rope_base)[0] for i in range(2))
        keys.append(k)
        values.append(silu(m.wv.weight @ n + m.wv.bias))
        scores = torch.stack([q @ k for k in keys]) / math.sqrt(CONFIG.z_dim)
        seen = scores.softmax(0) @ torch.stack(values)
        r = silu(m.wr.weight @ mx + m.wr.bias)
        candidate = silu(m.wc.weight @ mx + m.wc.bias + m.wh.weight @ (seen * r))
        u = 1 / (1 + torch.exp(-(m.wu.weight @ mx + m.wu.bias)))
        y = u * candidate + (1 - u) * x[t]
        f = block.nffn
        out.append(y + f.fc2.weight @ silu(f.fc1.weight @ layer_norm(f.norm, y) + f.fc1.bias) + f.fc2.bias)
    return torch.stack(out), h


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = MegaBlock(CONFIG).double()
    for part in block.parameters():
        torch.nn.init.normal_(part, std=0.5)
    return block


@pytest.mark.parametrize("cut", [0, 3, 8, 10])
def test_equals_the_loop_with_all_gradients_for_any_cut(block, cut):
    x = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    starts = torch.zeros(2, 11, dtype=torch.bool)
    starts[1, 5] = True
    inputs = [x, *block.parameters()]
    state, found = None, []
    for piece in (slice(0, cut), slice(cut, 11)):
        if x[:, piece].shape[1]:
            y, tree = block(x[:, piece], state, Boundaries(starts[:, piece]))
            found.append(y)
            state = Sealed(tree)
    rows = [definition(block, row, begun) for row, begun in zip(x, starts, strict=True)]
    actual = [torch.cat(found, 1), tree["ema"].squeeze(-1)]
    expected = [torch.stack(part) for part in zip(*rows, strict=True)]
    assert_close(actual, expected, 1e-12)
    weights = [torch.randn_like(t) for t in expected]
    grads = [torch.autograd.grad(sum((t * w).sum() for t, w in zip(o, weights, strict=True)), inputs)
             for o in (actual, expected)]  # fmt: skip
    assert_close(*grads, 1e-11)


def test_initial_values_are_those_of_the_authors():
    torch.manual_seed(0)
    ema = Mega(MegaConfig(num_layers=1, model_dim=256, z_dim=64, value_dim=512, ffn_hidden_dim=512)).layers[0].mega.ema
    signs = torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    for values, std in ((ema.alpha, 0.2), (ema.delta, 0.2), (ema.beta - signs, 0.02), (ema.gamma, 1), (ema.omega, 1)):
        assert values.std().item() == pytest.approx(std, rel=0.1)
        assert abs(values.mean().item()) < 0.1 * std


def test_proportions_of_a_wanted_size():
    config = config_of({"architecture": "mega", "parameters": 1_500_000, "vocab_size": 259})
    assert (config.num_layers, config.chunk_size, config.reading_unit) == (6, 512, 512)
    assert config.value_dim == 2 * config.model_dim == 8 * config.z_dim
    assert 1 < config.ffn_hidden_dim / config.model_dim < 3
    with pytest.raises(InputError, match="z_dim = 3 must be even"):
        MegaConfig(z_dim=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mega", "mamba"])
def test_stable_over_a_hundred_thousand_tokens_with_states_in_float32(name):
    """Also by autocast in bf16, which leaves the recurrence's states alone."""
    torch.manual_seed(0)
    model = build(config_of({"architecture": name, "parameters": 100_000, "vocab_size": 259, "num_layers": 2})).eval()
    tokens, state = torch.randint(0, 259, (1, 16_384)), None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(7):
            losses, state = model(tokens, state, targets=tokens, reduction="none")
            assert losses.isfinite().all()
            assert losses.max() < 20
    of_recurrence = [layer["ema" if name == "mega" else "scan"] for layer in state.parts["layers"]]
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in of_recurrence)
