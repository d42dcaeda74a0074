"""Gated DeltaNet against the layer of transformers' Qwen3-Next, and against its recurrence written out."""

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm.baselines.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetMixer
from megalodon_lm.errors import InputError
from megalodon_lm.ops.gated_delta_rule import gated_delta_rule

from .ops.cases import assert_close, gradients

CONFIG = GatedDeltaNetConfig(
    vocab_size=40, num_layers=2, model_dim=32, num_heads=2, head_dim=12, value_head_dim=24, ffn_hidden_dim=48
)  # fmt: skip


def mixer(dtype):
    """With every parameter random and large enough to matter."""
    torch.manual_seed(0)
    made = GatedDeltaNetMixer(CONFIG)
    for part in made.modules():
        if hasattr(part, "init_weights"):
            part.init_weights()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "proj" in name or "o_norm" in name:
                p.normal_(std=0.3)
        made.dt_bias += 3
    return made.to(dtype)


def case(length, dtype):
    return torch.randn(2, length, CONFIG.model_dim, generator=torch.Generator().manual_seed(1), dtype=dtype)


def written_out(m, x):
    """The mixer token by token, in the formulas of docs/baselines.md."""
    rows = []
    for row in x:
        memory = [x.new_zeros(CONFIG.value_head_dim, CONFIG.head_dim) for _ in range(CONFIG.num_heads)]
        seen, out = [], []
        for token in row:
            seen.append([projection(token) for projection in (m.q_proj, m.k_proj, m.v_proj)])
            convolved = []
            for part, convolution in enumerate((m.q_conv, m.k_conv, m.v_conv)):
                newest = [taken[part] for taken in reversed(seen[-4:])]
                convolved.append(F.silu(sum(convolution.weight[:, 3 - j] * t for j, t in enumerate(newest))))
            rate = F.softplus(m.a_proj(token) + m.dt_bias) * m.A_log.exp()
            beta, gate, heads = torch.sigmoid(m.b_proj(token)), m.g_proj(token), []
            for h in range(CONFIG.num_heads):
                q, k, v, g = (t.chunk(CONFIG.num_heads)[h] for t in (*convolved, gate))
                q, k = (t / (t.square().sum() + 1e-6).sqrt() for t in (q, k))
                kept = torch.exp(-rate[h]) * memory[h]
                memory[h] = kept + beta[h] * torch.outer(v - kept @ k, k)
                y = memory[h] @ q / CONFIG.head_dim**0.5
                y = y / (y.square().mean() + CONFIG.norm_eps).sqrt() * (m.o_norm.weight + 1)
                heads.append(y * F.silu(g))
            out.append(m.o_proj(torch.cat(heads)))
        rows.append(torch.stack(out))
    return torch.stack(rows)


def test_mixer_equals_its_recurrence_written_out_with_all_gradients():
    m, x = mixer(torch.float64), case(70, torch.float64)
    found = []
    for run in (lambda: m(x)[0], lambda: written_out(m, x)):
        y = run()
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        found.append([y, *torch.autograd.grad((y * weight).sum(), list(m.parameters()))])
    assert all(grad.abs().max() > 1e-3 for grad in found[1])
    assert_close(found[0], found[1], 1e-11)


def test_mixer_equals_that_of_transformers():
    """With its order of weights: queries, keys, values and gates of a head after each other."""
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    c, ours, x = CONFIG, mixer(torch.float32), case(100, torch.float32)
    theirs = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=c.model_dim, linear_num_value_heads=c.num_heads, linear_num_key_heads=c.num_heads,
            linear_key_head_dim=c.head_dim, linear_value_head_dim=c.value_head_dim,
            linear_conv_kernel_dim=c.num_taps, rms_norm_eps=c.norm_eps, num_hidden_layers=1,
        ),
        0,
    )  # fmt: skip

    def by_heads(*projections):
        return torch.cat(
            [w for heads in zip(*(p.weight.chunk(c.num_heads) for p in projections), strict=True) for w in heads]
        )

    with torch.no_grad():
        theirs.in_proj_qkvz.weight.copy_(by_heads(ours.q_proj, ours.k_proj, ours.v_proj, ours.g_proj))
        theirs.in_proj_ba.weight.copy_(by_heads(ours.b_proj, ours.a_proj))
        theirs.conv1d.weight.copy_(torch.cat([t.weight for t in (ours.q_conv, ours.k_conv, ours.v_conv)])[:, None])
        theirs.A_log.copy_(ours.A_log)
        theirs.dt_bias.copy_(ours.dt_bias)
        theirs.norm.weight.copy_(ours.o_norm.weight + 1)
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
    actual = gradients(lambda x: [ours(x)[0]], [x])
    expected = gradients(lambda x: [theirs(x)], [x])
    assert_close(actual[0], expected[0], 1e-5)
    assert_close(actual[1], expected[1], 1e-4)


@pytest.mark.parametrize("name", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_rule_equals_those_of_transformers_with_all_gradients(name):
    from transformers.models.qwen3_next import modeling_qwen3_next

    theirs, generator = getattr(modeling_qwen3_next, name), torch.Generator().manual_seed(0)
    q, k, v, decay, beta = (torch.randn(s, generator=generator) for s in ((2, 100, 3, 16),) * 3 + ((2, 100, 3),) * 2)
    inputs = [
        q,
        F.normalize(k, dim=-1),
        v,
        -decay.exp(),
        beta.sigmoid(),
        torch.randn(2, 3, 16, 16, generator=generator),
    ]

    def expected(q, k, v, log_decay, beta, state):
        return theirs(q * 4, k, v, log_decay, beta, initial_state=state, output_final_state=True)

    actual, expected = gradients(gated_delta_rule, inputs), gradients(expected, inputs)
    assert_close(actual[0], expected[0], 1e-5)
    assert_close(actual[1], expected[1], 1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": 0}, "num_heads = 0 must be at least 1"),
        ({"num_taps": 1}, "num_taps = 1 must be at least 2"),
        ({"norm_eps": -1.0}, "norm_eps = -1.0 must be positive"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        GatedDeltaNetConfig(**values)


def test_sizes_keep_the_proportions_of_the_library():
    config = GatedDeltaNetConfig.sized(1_500_000, 259)
    assert config.num_heads * config.head_dim == config.model_dim * 3 // 4
    assert config.value_head_dim == 2 * config.head_dim
    assert 2 < config.ffn_hidden_dim / config.model_dim < 3.5
    with pytest.raises(InputError, match="num_heads = 2 follows from parameters"):
        GatedDeltaNetConfig.sized(1_500_000, 259, num_heads=2)
