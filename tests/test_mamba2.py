"""Mamba-2 against the model of transformers with the same weights."""

import pytest
import torch

from megalodon_lm.baselines.mamba2 import Mamba2, Mamba2Config
from megalodon_lm.errors import InputError

CONFIG = Mamba2Config(
    vocab_size=40, num_layers=2, model_dim=32, head_dim=16, state_dim=12, num_groups=2, norm_eps=1e-3
)  # fmt: skip
NAMES = {
    "embed.weight": "backbone.embeddings.weight",
    "output.final_norm.weight": "backbone.norm_f.weight",
    "output.output.weight": "lm_head.weight",
}


@pytest.fixture(scope="module")
def models():
    """Ours, and transformers'; parameters whose initial values are equal or zero are random."""
    import transformers

    torch.manual_seed(0)
    ours, c = Mamba2(CONFIG), CONFIG
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.model_dim,
            num_hidden_layers=c.num_layers,
            num_heads=c.num_heads,
            head_dim=c.head_dim,
            state_size=c.state_dim,
            n_groups=c.num_groups,
            expand=c.expansion,
            conv_kernel=c.num_taps,
            layer_norm_epsilon=c.norm_eps,
            chunk_size=32,
            tie_word_embeddings=False,
            residual_in_fp32=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.dim() == 1 and not name.endswith(("A_log", "dt_bias")):
                p.normal_(std=0.3)
        for name, p in ours.named_parameters():
            stored = 1 if name.endswith("norm.weight") else 0
            theirs.get_parameter(their_name(name)).copy_((p + stored).view_as(theirs.get_parameter(their_name(name))))
    return ours.eval(), theirs.eval()


def their_name(name):
    return NAMES.get(name, f"backbone.{name}")


def test_equals_transformers_with_all_gradients(models):
    ours, theirs = models
    tokens = torch.randint(0, 40, (2, 100), generator=torch.Generator().manual_seed(1))
    logits, _ = ours(tokens)
    expected = theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    loss, _ = ours(tokens[:, :-1], targets=tokens[:, 1:])
    loss.backward()
    theirs(tokens, labels=tokens, use_cache=False).loss.backward()
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    for name, p in ours.named_parameters():
        grad = theirs.get_parameter(their_name(name)).grad.view_as(p)
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item(), msg=name)


def test_steps_equal_those_of_transformers(models):
    """A prompt, then token by token, each with its own state."""
    ours, theirs = models
    tokens = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits, state = ours(tokens[:, :15])
        out = theirs(tokens[:, :15], use_cache=True)
        for t in range(15, 20):
            torch.testing.assert_close(logits[:, -1], out.logits[:, -1], rtol=1e-4, atol=1e-5)
            logits, state = ours(tokens[:, t : t + 1], state)
            out = theirs(tokens[:, t : t + 1], cache=out.cache, use_cache=True)


def test_initial_values_are_those_of_the_library():
    torch.manual_seed(0)
    mixer = Mamba2(Mamba2Config(vocab_size=40, num_layers=4, model_dim=256)).layers[0].mixer
    steps, rates = torch.nn.functional.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 0.101
    assert rates.min() >= 1
    assert rates.max() <= 16
    assert abs(mixer.out_proj.weight.std() * (3 * 512) ** 0.5 * 2 - 1) < 0.05  # uniform, over sqrt(4 layers)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_dim": 60}, "head_dim = 60 must divide expansion"),
        ({"num_groups": 3}, "num_groups = 3 must divide the 80 heads"),
        ({"num_taps": 1}, "num_taps = 1 must be at least 2"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0 must be positive"),
        ({"state_dim": 0}, "state_dim = 0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Mamba2Config(**values)


def test_groups_of_heads_take_part_in_sizes():
    config = Mamba2Config.sized(3_000_000, 259, num_groups=2)
    assert config.num_groups == 2
    assert abs(config.num_parameters / 3_000_000 - 1) <= 0.01
    with pytest.raises(InputError, match="state_dim = 64 follows from parameters"):
        Mamba2Config.sized(3_000_000, 259, state_dim=64)
