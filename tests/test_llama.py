"""Our Llama is transformers' Llama within its window, with all gradients, and any cut of it beyond."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm.baselines.llama import Llama, LlamaConfig
from megalodon_lm.baselines.rope_scaling import RopeScaling, attention_factor, scaled_base
from megalodon_lm.data.books import bundled
from megalodon_lm.errors import InputError
from megalodon_lm.ops.rotary import frequencies

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
WINDOW, VOCABULARY = 32, 40
SIZES = dict(vocab_size=VOCABULARY, num_layers=2, model_dim=32, num_heads=2, ffn_hidden_dim=48, window=WINDOW)


def halves(weight, heads):
    """Rows of adjacent pairs to rows of all first features of a head, then all second ones, as in transformers."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def pairs(weight, heads):
    """The way back."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


OTHERS = {
    "norm.weight": "input_layernorm.weight", "mixer.wq.weight": "self_attn.q_proj.weight",
    "mixer.wk.weight": "self_attn.k_proj.weight", "mixer.wv.weight": "self_attn.v_proj.weight",
    "mixer.wo.weight": "self_attn.o_proj.weight", "feed_forward.norm.weight": "post_attention_layernorm.weight",
    "feed_forward.fc1.weight": "mlp.gate_proj.weight", "feed_forward.fc3.weight": "mlp.up_proj.weight",
    "feed_forward.fc2.weight": "mlp.down_proj.weight",
}  # fmt: skip


def other_name(name):
    whole = {"embed.weight": "model.embed_tokens.weight", "output.final_norm.weight": "model.norm.weight",
             "output.output.weight": "lm_head.weight"}  # fmt: skip
    if name in whole:
        return whole[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{OTHERS[rest]}"


def transformers_llama(model):
    """The same model of the library."""
    from transformers import LlamaConfig as OtherConfig
    from transformers import LlamaForCausalLM

    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_base}
    if c.rope_scaling != "none":
        trained = int(c.window / c.rope_factor)
        rope |= {"rope_type": c.rope_scaling, "factor": c.rope_factor, "original_max_position_embeddings": trained}
    other = LlamaForCausalLM(
        OtherConfig(
            vocab_size=c.vocab_size, hidden_size=c.model_dim, intermediate_size=c.ffn_hidden_dim,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_heads,
            max_position_embeddings=c.window, rms_norm_eps=c.norm_eps, rope_parameters=rope, tie_word_embeddings=False,
            attn_implementation="sdpa", pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    given = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("wq.weight", "wk.weight")):
            weight = halves(weight, c.num_heads)
        given[other_name(name)] = weight + 1 if "norm" in name else weight
    other.load_state_dict(given, strict=True)
    return other.to(model.dtype)


def build(dtype=torch.float32, seed=0, **changes):
    """Weights so large that attention is no mean, and norms that scale."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**{**SIZES, "init_mode": "he", **changes}))
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype)


def tokens(batch, length, seed=0):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 3e-5)])
@pytest.mark.parametrize("scaling", ["none", "linear", "yarn"])
def test_equals_transformers_with_all_gradients(scaling, dtype, tolerance):
    """In float64 up to the angles, which transformers computes in float32."""
    model = build(dtype, **({} if scaling == "none" else {"rope_scaling": scaling, "rope_factor": 8.0, "window": 8192}))
    length = WINDOW if scaling == "none" else 128  # trained with 1,024, where yarn has pairs of all three kinds
    other = transformers_llama(model)
    read = tokens(2, length + 1)
    logits, _ = model(read[:, :-1])
    torch.testing.assert_close(logits, other(read[:, :-1]).logits, rtol=100 * tolerance, atol=10 * tolerance)
    loss, _ = model(read[:, :-1], targets=read[:, 1:])
    expected = F.cross_entropy(other(read[:, :-1]).logits.flatten(0, 1), read[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    loss.backward()
    expected.backward()
    found = dict(other.named_parameters())
    for name, p in model.named_parameters():
        grad = found[other_name(name)].grad
        if name.endswith(("wq.weight", "wk.weight")):
            grad = pairs(grad, model.config.num_heads)
        assert ((p.grad - grad).abs().max() / grad.abs().max()).item() <= 30 * tolerance, name


def test_ntk_changes_the_base_so_that_the_slowest_pair_turns_as_with_interpolation():
    trained, dim = 128, 16
    plain, linear, ntk = (
        frequencies(dim, scaled_base(RopeScaling(kind, 8.0, trained), dim, 1e4)) for kind in ("none", "linear", "ntk")
    )
    torch.testing.assert_close(ntk[-1], linear[-1])
    assert ntk[0] == plain[0]
    assert scaled_base(RopeScaling("ntk", 8.0, trained), dim, 1e4) == pytest.approx(1e4 * 8 ** (16 / 14))
    assert attention_factor(RopeScaling("ntk", 8.0, trained)) == 1
    assert attention_factor(RopeScaling("yarn", 8.0, trained)) == pytest.approx((1 + 0.1 * math.log(8)) ** 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_long_text_is_read_in_any_pieces(dtype):
    """Beyond the window too: logits, the cache at the end, and gradients through it."""
    model, read = build(dtype), tokens(2, 100)
    found = []
    for cuts in ([0, 100], [0, 1, 20, 53, 54, 100]):
        state, logits = None, []
        for a, b in pairwise(cuts):
            piece, state = model(read[:, a:b], state)
            logits.append(piece)
        out = torch.cat(logits, 1)
        (out.square().sum() + sum(t.square().sum() for t in state.tensors().values())).backward()
        found.append([out, *state.tensors().values(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4 * b.abs().max().item() if b.is_floating_point() else 0)


def test_the_last_window_of_each_block_is_all_that_is_seen():
    """A token reaches as far as two blocks of windows, and no further, exactly."""
    model, length = build(torch.float64), 2 * WINDOW + 10
    x = model.embed(tokens(1, length)).detach().requires_grad_()
    out, _ = model.body(x)
    (grad,) = torch.autograd.grad(out[0, -1].square().sum(), x)
    reached = (grad[0] != 0).any(1)
    assert not reached[: length - 2 * WINDOW + 1].any()
    assert reached[length - 2 * WINDOW + 1 :].all()


@pytest.mark.parametrize("parameters", [100_000, 1_500_000, 21_700_000])
def test_sizes_have_the_proportions_of_llama(parameters):
    config = LlamaConfig.sized(parameters, 259)
    assert config.num_parameters == pytest.approx(parameters, rel=0.01)
    assert 0.75 <= config.ffn_hidden_dim / config.model_dim / (8 / 3) <= 1.33
    assert 32 <= config.model_dim // config.num_heads <= 96
    by_four = LlamaConfig.sized(parameters, 259, num_heads=4, num_layers=3, window=100)
    assert (by_four.num_heads, by_four.num_layers, by_four.window) == (4, 3, 100)
    assert by_four.num_parameters == pytest.approx(parameters, rel=0.01)
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(config).parameters()) == config.num_parameters


def test_parameters_and_operations_of_the_published_size():
    config = LlamaConfig()
    assert config.num_parameters == 6_738_415_616  # of Llama 2 7B
    linear = config.num_parameters - 32_000 * 4096 - 65 * 4096
    assert config.flops_per_token() == 2 * linear + 2 * 32 * 2 * 4096 * 4096
    assert config.flops_per_token(backward=True) == 3 * config.flops_per_token()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 1}, "window = 1 must be at least 2"),
        ({"num_heads": 3}, "num_heads = 3 must cut model_dim = 4096 into heads of even width"),
        ({"rope_factor": 8.0}, "rope_factor = 8.0 must be 1 without rope_scaling"),
        ({"rope_scaling": "dynamic"}, "rope_scaling = 'dynamic' must be one of 'none', 'linear', 'ntk', 'yarn'"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        LlamaConfig(**values)


@pytest.mark.slow
def test_training_reaches_the_loss_of_transformers_in_a_plain_loop():
    """Same weights, data and optimiser: bytes of the novels, 60 steps."""
    (novel,) = bundled("validation").values()
    text = torch.frombuffer(bytearray(novel[20_000:60_000]), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = Llama(LlamaConfig.sized(300_000, 256, num_layers=3, window=64))
    other = transformers_llama(model)
    found = []
    for one, loss_of in ((model, lambda x, y: model(x, targets=y)[0]), (other, lambda x, y: plain_loss(other, x, y))):
        optimizer = torch.optim.AdamW(one.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.0)
        losses = []
        for step in range(60):
            at = torch.randint(len(text) - 65, (8,), generator=torch.Generator().manual_seed(step))
            rows = torch.stack([text[i : i + 65] for i in at.tolist()])
            loss = loss_of(rows[:, :-1], rows[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    ours, theirs = (sum(losses[-10:]) / 10 for losses in found)
    assert ours == pytest.approx(theirs, rel=0.01)
    assert ours < 0.6 * found[0][0]  # both have learnt


def plain_loss(model, x, y):
    return F.cross_entropy(model(x, use_cache=False).logits.flatten(0, 1), y.flatten())
