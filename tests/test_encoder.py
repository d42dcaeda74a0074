"""The encoder: sizes, definition, padding, pieces, files."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm import State
from megalodon_lm.errors import InputError
from megalodon_lm.model.encoder import Encoder
from megalodon_lm.model.encoder_config import ENCODER_SIZES, EncoderConfig
from megalodon_lm.ops import bidirectional_definitions as definitions
from megalodon_lm.ops import reference
from megalodon_lm.ops.boundaries import Boundaries

CHOICES = {
    "tokens": {},
    "laplace": dict(attention="laplace", input="numbers", after_cema="silu", residual="two_hop"),
    "chunks": dict(chunk_size=5, num_heads=2, norm_num_groups=4, swiglu=True, rescale_nffn=True),
    "patches": dict(input="patches", patch_dim=3, cema="real"),
    "pairs": dict(pairs=True, cema="none", num_classes=3),
    "forward": dict(direction="forward", chunk_size=4, input="numbers", norm_num_groups=4),
    "forward_real": dict(direction="forward", chunk_size=3, cema="real", after_cema="silu"),
}


def build(seed=0, **choices):
    torch.manual_seed(seed)
    model = Encoder(EncoderConfig.named("encoder_tiny", **choices)).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def draw(config, batch, length, seed=1):
    g = torch.Generator().manual_seed(seed)
    shape = (batch, 2, length) if config.pairs else (batch, length)
    if config.input == "tokens":
        return torch.randint(config.vocab_size, shape, generator=g)
    shape = (*shape, config.patch_dim) if config.input == "patches" else shape
    return torch.randn(shape, generator=g, dtype=torch.float64)


# What was published counts twelve outputs of a real-valued input, and the scale of an RMSNorm where there is silu.
PUBLISHED = {
    "listops": "569K", "text": "911K", "retrieval": "1.36M", "image": "2.59M", "pathfinder": "1.36M", "pathx": "247K",
    "sc_raw": "305K",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    counted = EncoderConfig.named(name, num_classes=12, input="numbers", after_cema="rmsnorm").num_parameters
    rounded = f"{counted / 1e3:.0f}K" if counted < 1e6 else f"{counted / 1e6:.2f}M"
    assert rounded == PUBLISHED[name]
    own = EncoderConfig.named(name).num_parameters
    of_tokens = ENCODER_SIZES[name].get("vocab_size", 256) * ENCODER_SIZES[name]["model_dim"]
    assert abs(own - (of_tokens if "input" not in ENCODER_SIZES[name] else 0) - counted) / counted < 0.006


def test_raw_speech_has_exactly_as_many_parameters_as_published():
    config = EncoderConfig.named("sc_raw")
    with torch.device("meta"):
        model = Encoder(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters == 304_680


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_parameters_are_counted(choices):
    model = build(**choices)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters
    assert model.config.flops_per_token(backward=True) == 3 * model.config.flops_per_token()


@pytest.mark.parametrize("wanted", [100_000, 1_000_000])
def test_sized(wanted):
    config = EncoderConfig.sized(wanted, 18, num_heads=2)
    assert abs(config.num_parameters / wanted - 1) < 0.01


def definition(model, inputs, lengths):
    """The whole encoder in the words of the definitions, for one block layout."""
    c, where = model.config, Boundaries(None, lengths)
    rows = torch.arange(inputs.shape[1]) < lengths[:, None]
    x = model.embed(inputs)
    for block in model.layers:
        m, ffn = block.mega, block.nffn
        n = m.timenorm
        tn = definitions.sequence_norm(x, n.weight, n.bias, c.groups, c.norm_eps, where)
        a = m.cema
        halves = zip(*(t.chunk(2) for t in (a.alpha, a.delta, a.theta, a.gamma)), strict=True)
        before, after = (reference.cema_coefficients(*h) for h in halves)
        y = definitions.bidirectional_cema(tn, before, after, a.omega[:, 0], where)
        if c.after_cema == "silu":
            mx = F.silu(y)
        else:
            mx = y / (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * (m.rmsnorm.weight + 1)
        z = reference.head_rms_norm(m.wz(mx), c.num_heads, c.norm_eps)
        q, k = (z * (m.gamma[i] + 1) / (c.z_dim / c.num_heads) ** 0.5 + m.beta[i] for i in range(2))
        q, k, v = (t.unflatten(-1, (c.num_heads, -1)) for t in (q, k, F.silu(m.wv(tn))))
        out = definitions.bidirectional_attention(q, k, v, c.chunk_size, c.rope_base, c.attention, where)
        y = x + m.wh1(mx) + m.wh2(out.flatten(-2) * F.silu(m.wr(mx)))
        n = F.layer_norm(y, (c.model_dim,), ffn.norm.weight + 1, ffn.norm.bias, c.norm_eps)
        hidden = F.silu(ffn.fc1(n)) * (ffn.fc3(n) if c.swiglu else 1)
        branch = ffn.fc2(hidden) * (ffn.alpha if c.rescale_nffn else 1)
        x = (x if c.residual == "two_hop" else y) + branch
    head = model.output
    x = definitions.sequence_norm(x, head.final_norm.weight, head.final_norm.bias, c.groups, c.norm_eps, where)
    x = F.silu(head.proj(x) + x) * rows[..., None]
    return head.output(x.sum(1) / lengths[:, None])


@pytest.mark.parametrize("choices", ["tokens", "laplace", "chunks"])
def test_equals_definition_with_all_gradients(choices):
    model = build(**CHOICES[choices])
    inputs, lengths = draw(model.config, 2, 7), torch.tensor([7, 4])
    mask = torch.arange(7) < lengths[:, None]
    parameters = dict(model.named_parameters())
    found, state = model(inputs, mask=mask)
    expected = definition(model, inputs, lengths)
    assert state is None
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn(found.shape, dtype=torch.float64)
    grads, wanted = (torch.autograd.grad((y * weights).sum(), parameters.values()) for y in (found, expected))
    for name, a, e in zip(parameters, grads, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_padding_anywhere_leaves_no_trace(choices, data):
    model = build(**choices)
    rows = 4 if model.config.pairs else 2
    row = st.lists(st.booleans(), min_size=9, max_size=9).filter(any)
    mask = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)))
    if model.config.pairs:
        mask = mask.view(2, 2, 9)
    inputs = draw(model.config, 2, 9)
    if inputs.is_floating_point():
        inputs[~mask] = torch.nan
    logits, _ = model(inputs, mask=mask)
    for row in range(2):
        if model.config.pairs:
            continue
        alone, _ = model(inputs[row : row + 1][:, mask[row]])
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    assert all(torch.isfinite(g).all() for g in grads)


def test_pairs_are_two_sequences_of_one_encoder():
    model = build(**CHOICES["pairs"])
    inputs = draw(model.config, 3, 6)
    logits, _ = model(inputs)
    swapped, _ = model(inputs.flip(1))
    features = []
    model.output.output.register_forward_pre_hook(lambda _, x: features.append(x[0]))
    model(inputs)
    a, b, product, difference = features[0].chunk(4, -1)
    torch.testing.assert_close(product, a * b)
    torch.testing.assert_close(difference, a - b)
    assert logits.shape == (3, 3)
    assert not torch.allclose(logits, swapped)


@pytest.mark.parametrize("name", ["forward", "forward_real"])
@settings(deadline=None, max_examples=8)
@given(cuts=st.lists(st.integers(0, 13), max_size=4))
def test_any_pieces_give_what_the_whole_gives(name, cuts):
    model = build(**CHOICES[name])
    inputs = draw(model.config, 2, 13)
    whole, last = model(inputs)
    state, bounds = None, [0, *sorted(cuts), 13]
    for begin, end in pairwise(bounds):
        logits, state = model(inputs[:, begin:end], state)
    torch.testing.assert_close(logits, whole, rtol=1e-11, atol=1e-11)
    for a, e in zip(state.tensors().values(), last.tensors().values(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_what_comes_in_pieces_sees_nothing_of_what_follows():
    model = build(**CHOICES["forward"])
    inputs = draw(model.config, 1, 9).requires_grad_()
    x, _ = model.body(model.embed(inputs))
    (grad,) = torch.autograd.grad(x[:, 4].square().sum(), inputs)
    assert (grad[:, 5:] == 0).all()
    assert (grad[:, :5] != 0).all()


def test_state_goes_through_a_file(tmp_path):
    model = build(**CHOICES["forward"])
    inputs = draw(model.config, 2, 10)
    _, state = model(inputs[:, :7])
    state.save(tmp_path / "state", model)
    restored, _ = model(inputs[:, 7:], State.load(tmp_path / "state", model))
    torch.testing.assert_close(restored, model(inputs[:, 7:], state)[0], rtol=0, atol=0)


@pytest.mark.parametrize("choices", ["tokens", "forward"])
def test_files(tmp_path, choices):
    torch.manual_seed(0)
    model = Encoder(EncoderConfig.named("encoder_tiny", **CHOICES[choices])).eval()
    model.save(tmp_path)
    loaded = Encoder.load(tmp_path)
    assert loaded.config == model.config
    assert loaded.fingerprint() == model.fingerprint()
    inputs = draw(model.config, 2, 8)
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    assert torch.equal(loaded(inputs)[0], model(inputs)[0])
    EncoderConfig.named("encoder_tiny", **{**CHOICES[choices], "rope_base": 5e5}).save(tmp_path / "config.json")
    with pytest.raises(InputError, match="was edited"):
        Encoder.load(tmp_path)


def test_native_and_portable_paths_agree():
    torch.manual_seed(0)
    model = Encoder(EncoderConfig.named("encoder_tiny", attention="laplace", input="numbers"))
    inputs, targets = draw(model.config, 3, 40).float(), torch.tensor([1, 2, 3])
    mask = torch.arange(40) < torch.tensor([40, 13, 29])[:, None]
    loss, _ = model(inputs, targets=targets, mask=mask)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    wide = model.double()
    expected, _ = wide(inputs.double(), targets=targets, mask=mask)
    wanted = torch.autograd.grad(expected, list(wide.parameters()))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for a, e in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("choices", ["tokens", "laplace", "forward"])
def test_one_graph_computes_what_the_model_does(choices):
    torch.manual_seed(0)
    model = Encoder(EncoderConfig.named("encoder_tiny", **{**CHOICES[choices], "num_layers": 1}))
    inputs, mask = draw(model.config, 2, 9), torch.arange(9) < torch.tensor([9, 4])[:, None]
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = compiled(inputs, mask=mask)[0], model(inputs, mask=mask)[0]
    torch.compiler.reset()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_checkpointed_blocks_have_the_same_gradients():
    config = EncoderConfig.named("encoder_tiny")
    torch.manual_seed(0)
    plain = Encoder(config)
    torch.manual_seed(0)
    saving = Encoder(config, activation_checkpointing=True)
    inputs, targets = draw(config, 2, 9), torch.tensor([0, 1])
    for model in (plain, saving):
        model(inputs, targets=targets)[0].backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), saving.parameters(), strict=True))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(direction="forward"), "chunk_size"),
        (dict(direction="forward", chunk_size=4, attention="laplace"), "attention = 'laplace' needs"),
        (dict(norm_num_groups=3), "must divide model_dim"),
        (dict(num_heads=3), "multiple of num_heads"),
        (dict(num_heads=8), "odd width"),
        (dict(num_classes=0), "num_classes"),
    ],
)
def test_wrong_configurations_are_refused(choices, message):
    with pytest.raises(InputError, match=message):
        EncoderConfig.named("encoder_tiny", **choices)


def test_wrong_inputs_are_refused():
    model = build()
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(InputError, match="of shape"):
        model(tokens.float())
    with pytest.raises(InputError, match="token 256 is outside"):
        model(tokens + 256)
    with pytest.raises(InputError, match="mask must be"):
        model(tokens, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="no steps"):
        model(tokens, mask=torch.tensor([[True] * 5, [False] * 5]))
    with pytest.raises(InputError, match="no steps"):
        model(tokens[:, :0])
    with pytest.raises(InputError, match="targets must be"):
        model(tokens, targets=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="takes no state"):
        model(tokens, build(**CHOICES["forward_real"])(tokens)[1])
    with pytest.raises(InputError, match="known sizes: listops"):
        EncoderConfig.named("enormous")


def test_examples_of_the_docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "modalities.md").read_text(encoding="utf-8")
    names = {}
    torch.manual_seed(0)
    for example in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(example, names)
    assert names["logits"].shape == (2, 10)
    assert names["image"].shape == (32, 32)
    assert len(names["expressions"]) == 3
    torch.testing.assert_close(names["logits"], names["model"](names["sound"])[0], rtol=1e-4, atol=1e-4)
