"""Mamba against the one of transformers with the same weights."""

import pytest
import torch

from megalodon_lm.baselines.mamba import Mamba, MambaConfig

from .ops.cases import assert_close

CONFIG = MambaConfig(vocab_size=32, num_layers=2, model_dim=12, inner_dim=24, state_dim=4)


def as_ours(name):
    """The name of a weight of transformers in this package."""
    name = name.replace("backbone.embeddings", "embed").replace("backbone.norm_f", "output.final_norm")
    name = name.replace("backbone.", "").replace("lm_head", "output.output")
    return name.replace("dt_proj.bias", "dt_bias")


def value_as_ours(name, value):
    """Norms are stored as offsets from 1; a depthwise convolution here has no dimension of one."""
    if "norm" in name:
        return value - 1
    return value.squeeze(1) if "conv1d.weight" in name else value


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
def test_equals_transformers_with_all_gradients():
    import transformers

    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=12, num_hidden_layers=2, state_size=4, intermediate_size=24, use_mambapy=False,
        tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    assert config.layer_norm_epsilon == CONFIG.norm_eps
    theirs = transformers.MambaForCausalLM(config).double()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.copy_(torch.randn_like(value) * 0.3 + ("norm" in name))
    ours = Mamba(CONFIG).double()
    names = {as_ours(name): name for name, _ in theirs.named_parameters()}
    assert names.keys() == dict(ours.named_parameters()).keys()
    ours.load_state_dict({as_ours(n): value_as_ours(n, p.detach()) for n, p in theirs.named_parameters()})

    tokens = torch.randint(0, 32, (2, 21))
    expected = theirs(tokens, labels=tokens, use_cache=False)
    logits, _ = ours(tokens)
    assert_close([logits], [expected.logits], 1e-6)  # they take decays in float32
    loss, _ = ours(tokens[:, :-1], targets=tokens[:, 1:])
    assert_close([loss], [expected.loss], 1e-6)
    loss.backward()
    expected.loss.backward()
    for name, value in ours.named_parameters():
        grad = dict(theirs.named_parameters())[names[name]].grad
        grad = grad.squeeze(1) if "conv1d.weight" in name else grad
        assert_close([value.grad], [grad], 1e-5)


def test_initial_steps_and_decays():
    mixer = Mamba(MambaConfig(vocab_size=32, num_layers=1, model_dim=64, inner_dim=512)).layers[0].mixer
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 0.101
    assert steps.log().mean().exp().item() == pytest.approx(0.01, rel=0.2)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, -1))
