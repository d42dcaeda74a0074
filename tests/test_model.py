import math
import re

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.ops import reference

from .test_cut_invariant import build

VARIANTS = [{}, {"swiglu": False, "rescale_nffn": True}, {"share_emb": True, "scale_emb": True}]


def definition(model, tokens):
    """The decoder written out from the formulas, with the ops of the reference, on the model's own parameters."""
    c, w = model.config, dict(model.named_parameters())
    heads, eps = c.num_heads, c.norm_eps

    def linear(x, name):
        bias = w.get(f"{name}.bias")
        return x @ w[f"{name}.weight"].T + (0 if bias is None else bias)

    def silu(x):
        return x / (1 + torch.exp(-x))

    def rms(x, scale):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * (scale + 1)

    x = w["embed.weight"][tokens] * (math.sqrt(c.model_dim) if c.scale_emb else 1)
    for i in range(c.num_layers):
        a, f = f"layers.{i}.mega", f"layers.{i}.nffn"
        tn, _ = reference.timestep_norm(
            x, w[f"{a}.timenorm.weight"], w[f"{a}.timenorm.bias"], c.norm_num_groups, eps
        )
        p, q, g = reference.cema_coefficients(*(w[f"{a}.cema.{n}"] for n in ("alpha", "delta", "theta", "gamma")))
        mx = rms(reference.cema(tn, p, q, g, w[f"{a}.cema.omega"][:, 0])[0], w[f"{a}.rmsnorm.weight"])
        z = reference.head_rms_norm(linear(mx, f"{a}.wz"), heads, eps)
        scale = (w[f"{a}.gamma"] + 1) / math.sqrt(c.z_dim / heads)
        query, key = (z * scale[j] + w[f"{a}.beta"][j] for j in range(2))
        v, r = silu(linear(tn, f"{a}.wv")), silu(linear(mx, f"{a}.wr"))
        split = [t.unflatten(-1, (heads, -1)) for t in (query, key, v)]
        attended = reference.chunk_attention(*split, c.chunk_size, c.rope_base)[0].flatten(-2)
        y = x + linear(mx, f"{a}.wh1") + linear(attended * r, f"{a}.wh2")
        centred = y - y.mean(-1, keepdim=True)
        n = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * (w[f"{f}.norm.weight"] + 1)
        n = n + w[f"{f}.norm.bias"]
        hidden = silu(linear(n, f"{f}.fc1")) * (linear(n, f"{f}.fc3") if c.swiglu else 1)
        x = x + linear(hidden, f"{f}.fc2") * (w[f"{f}.alpha"] if c.rescale_nffn else 1)
    final = [w[f"output.final_norm.{n}"] for n in ("weight", "bias")]
    x, _ = reference.timestep_norm(x, *final, c.norm_num_groups, eps)
    return x @ w["embed.weight" if c.share_emb else "output.output.weight"].T


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_equals_the_written_out_definition_with_all_gradients(changes, dtype, tolerance):
    model, judge = build(dtype, **changes), build(torch.float64, **changes)
    judge.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    tokens = torch.randint(0, 30, (2, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for m, logits in ((model, model(tokens)[0]), (judge, definition(judge, tokens))):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        found.append((logits, torch.autograd.grad(loss, list(m.parameters()))))
    torch.testing.assert_close(found[0][0].double(), found[1][0], atol=tolerance * 10, rtol=0)
    for (name, _), actual, expected in zip(model.named_parameters(), found[0][1], found[1][1], strict=True):
        assert (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-4) < tolerance * 10, name


def test_parameter_names_are_those_of_the_authors_code():
    names = {re.sub(r"layers\.\d+\.", "", n) for n, _ in Megalodon(ModelConfig.named("tiny")).named_parameters()}
    linear = {f"mega.{n}.{p}" for n in ("wz", "wv", "wr", "wh1") for p in ("weight", "bias")}
    assert names == linear | {
        "embed.weight", "mega.wh2.weight", "mega.gamma", "mega.beta", "mega.timenorm.weight", "mega.timenorm.bias",
        "mega.cema.alpha", "mega.cema.delta", "mega.cema.theta", "mega.cema.gamma", "mega.cema.omega",
        "mega.rmsnorm.weight", "nffn.norm.weight", "nffn.norm.bias", "nffn.fc1.weight", "nffn.fc2.weight",
        "nffn.fc3.weight", "output.final_norm.weight", "output.final_norm.bias", "output.output.weight",
    }  # fmt: skip


@pytest.mark.parametrize(("mode", "std"), [("he", 1 / math.sqrt(3 * 512)), ("bert", 0.02), ("xavier", None)])
def test_initial_values(mode, std):
    torch.manual_seed(0)
    model = Megalodon(ModelConfig.named("bench22M", num_layers=1, init_mode=mode, rescale_nffn=True))
    w = dict(model.named_parameters())
    a = "layers.0.mega"
    expected = std or math.sqrt(2 / (512 + 1024))
    assert w[f"{a}.wv.weight"].std().item() == pytest.approx(expected, rel=0.02)
    if mode == "xavier":
        assert w[f"{a}.wv.weight"].abs().max() <= math.sqrt(6 / (512 + 1024))
    for name in ("embed.weight", "output.output.weight"):
        assert w[name].abs().max() <= 3 / math.sqrt(512)
        assert w[name].std().item() == pytest.approx(0.9866 / math.sqrt(512), rel=0.02)
    assert w[f"{a}.cema.alpha"].std().item() == pytest.approx(0.2, rel=0.05)
    assert w[f"{a}.cema.delta"].std().item() == pytest.approx(0.2, rel=0.05)
    frequency = torch.sigmoid(w[f"{a}.cema.theta"].flatten()).sort(descending=True).values
    torch.testing.assert_close(frequency, torch.exp(-torch.arange(1, 513) * math.log(512) / 512), rtol=1e-4, atol=1e-6)
    gamma = w[f"{a}.cema.gamma"]
    assert gamma[..., 0].std().item() == pytest.approx(1, rel=0.05)
    assert not gamma[..., 1].any()
    assert w[f"{a}.cema.omega"].abs().max() <= 1
    assert w[f"{a}.cema.omega"].std().item() == pytest.approx(0.25, rel=0.1)
    zeros = ("wv.bias", "wz.bias", "gamma", "beta", "timenorm.weight", "timenorm.bias", "rmsnorm.weight")
    assert not any(w[f"{a}.{n}"].any() for n in zeros)
    assert torch.equal(w["layers.0.nffn.alpha"], torch.full((512,), 0.1))


@pytest.mark.parametrize(
    "changes",
    [{"dropout": 0.5}, {"hidden_dropout": 0.5}, {"attention_dropout": 0.5}, {"attention_dropout": 0.5, "drop_keys": True}],
)
def test_dropout_acts_in_training_only(changes):
    model, plain = build(**changes), build()
    tokens = torch.randint(0, 30, (1, 30))
    assert torch.equal(model.eval()(tokens)[0], plain.eval()(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])


def test_activation_checkpointing_changes_nothing():
    tokens = torch.randint(0, 30, (2, 30), generator=torch.Generator().manual_seed(0))
    model, found = build(), []
    for model.activation_checkpointing in (False, True):
        _, state = model(tokens)
        loss = model(tokens, state)[0].square().sum()
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.tensor([[5, 300]]), {}, "token 300 is outside the vocabulary of 259"),
        (torch.tensor([[-1]]), {}, "token -1 is outside"),
        (torch.zeros(1, 2), {}, "int64 of shape"),
        (torch.zeros(2, dtype=torch.int64), {}, "int64 of shape"),
        (torch.zeros(1, 2, dtype=torch.int64), {"mask": torch.ones(1, 3, dtype=torch.bool)}, r"mask must be bool"),
        (torch.zeros(1, 2, dtype=torch.int64), {"document_starts": torch.ones(1, 2)}, "document_starts must be bool"),
    ],
)
def test_wrong_input_is_refused(tiny, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(tokens, **options)


@pytest.mark.parametrize("changes", [{}, {"share_emb": True}])
def test_save_and_load(changes, tmp_path):
    model = Megalodon(ModelConfig.named("tiny", **changes))
    model.save(tmp_path / "m")
    loaded = Megalodon.load(tmp_path / "m")
    tokens = torch.randint(0, 256, (1, 20))
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert loaded.fingerprint() == model.fingerprint()
    assert sum(p.numel() for p in loaded.parameters()) == model.config.num_parameters
    assert all(p.requires_grad for p in loaded.parameters())
    assert Megalodon.load(tmp_path / "m", dtype=torch.bfloat16).embed.weight.dtype == torch.bfloat16


def test_unusable_checkpoints_are_refused_by_name(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        Megalodon.load(tmp_path)
    tiny.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    for cut in (0, 5, 100, len(data) - 1):
        weights.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*truncated"):
            Megalodon.load(tmp_path)
    weights.write_bytes(data)
    ModelConfig.named("tiny", ffn_hidden_dim=64).save(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"does not fit .*config\.json: layers\.0\.nffn\.fc1\.weight has shape"):
        Megalodon.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Megalodon.load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        Megalodon.load(tmp_path)
