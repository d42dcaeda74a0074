import contextlib
import copy
import math
import random
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.errors import InputError
from megalodon_lm.model import checkpoint, identity
from megalodon_lm.ops import reference
from megalodon_lm.ops.recurrence_definitions import short_convolution

from .test_cut_invariant import build

VARIANTS = [
    {},
    {"swiglu": False, "rescale_nffn": True, "norm_eps": 0.1},
    {"share_emb": True, "scale_emb": True, "rope_base": 50.0},
    {"num_heads": 1, "norm_num_groups": 1, "cema_ndim": 1},
]


def definition(model, tokens, dropout=lambda x, p: x):
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

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
        return normed * (w[f"{name}.weight"] + 1) + w[f"{name}.bias"]

    def norm_over_time(x, name):
        norm = reference.timestep_norm if c.timestep_norm == "cumulative" else reference.decay_norm
        return norm(x, w[f"{name}.weight"], w[f"{name}.bias"], c.norm_num_groups, eps)[0]

    def average(x, name):
        if c.cema == "none":
            return x
        alpha, delta, gamma = (w[f"{name}.{n}"] for n in ("alpha", "delta", "gamma"))
        if c.cema == "complex":
            p, q, g = reference.cema_coefficients(alpha, delta, w[f"{name}.theta"], gamma)
        else:
            p, real = torch.sigmoid(alpha[..., 0]), 1 - torch.sigmoid(alpha[..., 0]) * torch.sigmoid(delta[..., 0])
            q, g = real.to(torch.complex128), gamma[..., 0].to(torch.complex128) / math.sqrt(c.cema_ndim)
        if c.cema_omega:
            return reference.cema(x, p, q, g, w[f"{name}.omega"][:, 0])[0]
        return reference.cema(x, p, q, g * math.sqrt(c.cema_ndim), torch.ones_like(p[:, 0]))[0]

    def attend(q, k, v):
        attention = reference.chunk_attention if c.attention == "chunk" else reference.sliding_attention
        return attention(q, k, v, c.chunk_size, c.rope_base, heads_without_rope=c.heads_without_rope)[0]

    def recall(q, k, v):
        return reference.adaptive_memory(q, k, v, c.chunk_size, 1 if c.attention == "chunk" else 2)[0]

    def split(x):
        return x.unflatten(-1, (heads, -1))

    def averaged(x, a):
        """The branch of a block behind a moving average."""
        tn = (norm_over_time if c.attention_norm == "timestep" else layer_norm)(x, f"{a}.timenorm")
        mx = dropout(rms(average(tn, f"{a}.cema"), w[f"{a}.rmsnorm.weight"]), c.hidden_dropout)
        z = linear(mx, f"{a}.wz")
        z = reference.head_rms_norm(z, heads, eps) if c.normalize_attention else z
        scale = (w[f"{a}.gamma"] + 1) / math.sqrt(c.z_dim / heads)
        views = [split(z * s + b) for s, b in zip(scale, w[f"{a}.beta"], strict=True)]
        v, r = split(silu(linear(tn, f"{a}.wv"))), silu(linear(mx, f"{a}.wr"))
        branch = attend(*views[:2], v).flatten(-2) * r
        if c.memory == "adaptive":
            branch = branch + recall(*views[2:], v).flatten(-2)
        return linear(mx, f"{a}.wh1") + linear(dropout(branch, c.hidden_dropout), f"{a}.wh2")

    def convolved(x, a):
        """The branch of a block behind short convolutions."""
        u = (norm_over_time if c.attention_norm == "timestep" else layer_norm)(x, f"{a}.timenorm")
        taps = [w[f"{a}.convolutions.{n}.weight"].softmax(-1) for n in "qkv"]
        mean = [short_convolution(linear(u, f"{a}.w{n}"), t)[0] for n, t in zip("qkv", taps, strict=True)]
        scale = (w[f"{a}.gamma"][0] + 1) / math.sqrt(c.z_dim / heads)
        normed = [reference.head_rms_norm(m, heads, eps) if c.normalize_attention else m for m in mean[:2]]
        q, k, v = split(mean[0]), split(mean[1]), split(silu(mean[2]))
        branch = attend(split(normed[0] * scale), split(normed[1]), v)
        if c.memory == "adaptive":
            branch = branch + recall(q, k, v)
        gate = torch.log2(1 + 2 ** linear(u, f"{a}.wr"))
        return linear(
            dropout(reference.head_rms_norm(branch.flatten(-2), heads, eps) * gate, c.hidden_dropout), f"{a}.wo"
        )

    x = dropout(w["embed.weight"][tokens] * (math.sqrt(c.model_dim) if c.scale_emb else 1), c.dropout)
    for i in range(c.num_layers):
        a, f = f"layers.{i}.mega", f"layers.{i}.nffn"
        y = x + dropout((averaged if c.mixer == "cema" else convolved)(x, a), c.dropout)
        n = layer_norm(y, f"{f}.norm")
        hidden = silu(linear(n, f"{f}.fc1")) * (linear(n, f"{f}.fc3") if c.swiglu else 1)
        hidden = linear(dropout(hidden, c.hidden_dropout), f"{f}.fc2")
        hidden = dropout(hidden, c.dropout) * (w[f"{f}.alpha"] if c.rescale_nffn else 1)
        x = hidden + (x if c.residual == "two_hop" else y)
    x = norm_over_time(x, "output.final_norm")
    return x @ w["embed.weight" if c.share_emb else "output.output.weight"].T


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_equals_the_written_out_definition_with_all_gradients(changes, dtype, tolerance):
    compare_with_definition(build(dtype, **changes), 40, tolerance * 10)


def compare_with_definition(model, length, tolerance):
    """Logits and all gradients."""
    judge = copy.deepcopy(model).double()
    tokens = torch.randint(0, 30, (2, length), generator=torch.Generator().manual_seed(0))
    found = []
    for m, logits in ((model, model(tokens)[0]), (judge, definition(judge, tokens))):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        found.append((logits, torch.autograd.grad(loss, list(m.parameters()))))
    torch.testing.assert_close(found[0][0].double(), found[1][0], atol=tolerance, rtol=0)
    for (name, _), actual, expected in zip(model.named_parameters(), found[0][1], found[1][1], strict=True):
        assert (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-4) < tolerance, name


def test_second_half_of_a_block_adds_to_the_input_of_the_first():
    """Two-hop residual: with a silent feed-forward network a block passes its input on."""
    block = build().layers[0]
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    assert not torch.equal(block(x)[0], x)
    with torch.no_grad():
        block.nffn.fc2.weight.zero_()
    assert torch.equal(block(x)[0], x)


def test_parameter_names_are_those_of_the_authors_code():
    names = {re.sub(r"layers\.\d+\.", "", n) for n, _ in Megalodon(ModelConfig.named("tiny")).named_parameters()}
    linear = {f"mega.{n}.{p}" for n in ("wz", "wv", "wr", "wh1") for p in ("weight", "bias")}
    assert names == linear | {
        "embed.weight", "mega.wh2.weight", "mega.gamma", "mega.beta", "mega.timenorm.weight", "mega.timenorm.bias",
        "mega.cema.alpha", "mega.cema.delta", "mega.cema.theta", "mega.cema.gamma", "mega.cema.omega",
        "mega.rmsnorm.weight", "nffn.norm.weight", "nffn.norm.bias", "nffn.fc1.weight", "nffn.fc2.weight",
        "nffn.fc3.weight", "output.final_norm.weight", "output.final_norm.bias", "output.output.weight",
    }  # fmt: skip


def test_initial_values():
    torch.manual_seed(0)
    model = Megalodon(ModelConfig.named("bench22M", num_layers=1))
    w = dict(model.named_parameters())
    a = "layers.0.mega"
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
    steps = w[f"{a}.cema.theta"].flatten().diff()
    assert 100 < (steps > 0).sum() < 412, "theta is not in a random order"
    zeros = [n for n in w if n.endswith((".bias", "norm.weight", "mega.gamma", "mega.beta"))]
    assert len(zeros) == 13
    assert not any(w[n].any() for n in zeros)


@pytest.mark.parametrize("kind", ["complex", "real"])
def test_initial_values_of_an_average_without_omega(kind):
    torch.manual_seed(0)
    model = Megalodon(ModelConfig.named("bench22M", num_layers=1, cema=kind, cema_omega=False))
    gamma = model.layers[0].mega.cema.gamma
    assert gamma[..., 0].std().item() == pytest.approx(1 / 4, rel=0.05)
    assert not gamma[..., 1:].any()


def test_initial_scales_of_the_feed_forward_output():
    model = Megalodon(ModelConfig.named("tiny", num_layers=3, rescale_nffn=True))
    for layer, scale in zip(model.layers, (0.1, 0.05, 0.025), strict=True):
        assert torch.equal(layer.nffn.alpha, torch.full((64,), scale))


def fan(mode, rows, columns):
    return {"he": 1 / math.sqrt(3 * columns), "bert": 0.02, "xavier": math.sqrt(2 / (rows + columns))}[mode]


@pytest.mark.parametrize("mode", ["he", "bert", "xavier"])
def test_every_linear_map_is_initialised_by_its_own_width(mode):
    torch.manual_seed(0)
    model = Megalodon(ModelConfig.named("small", num_layers=1, init_mode=mode))
    maps = {n: p for n, p in model.layers.named_parameters() if re.search(r"\.(w[a-z]+\d?|fc\d)\.weight$", n)}
    assert len(maps) == 8
    for name, weight in maps.items():
        if mode == "xavier":
            assert weight.abs().max() <= math.sqrt(6 / sum(weight.shape)), name
        assert weight.std().item() == pytest.approx(fan(mode, *weight.shape), rel=0.03), name


DROPOUTS = [
    {"dropout": 0.5},
    {"hidden_dropout": 0.5},
    {"attention_dropout": 0.5},
    {"attention_dropout": 0.5, "drop_keys": True},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("changes", DROPOUTS)
def test_dropout_acts_in_training_only(changes, dtype):
    model, plain = build(dtype, **changes), build(dtype)
    tokens = torch.randint(0, 30, (1, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(tokens)[0], plain.eval()(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("changes", VARIANTS[:2])
def test_dropout_stands_where_it_should(changes, monkeypatch):
    """With every dropout replaced by a factor that tells its probability, the model is still its definition."""
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x * (1 + p) if training else x)
    model = build(dropout=0.25, hidden_dropout=0.5, **changes).train()
    tokens = torch.randint(0, 30, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = definition(model, tokens, lambda x, p: x * (1 + p))
    torch.testing.assert_close(model(tokens)[0], expected, atol=1e-9, rtol=0)
    assert not torch.allclose(model.eval()(tokens)[0], expected)


@pytest.mark.parametrize("drop_keys", [False, True])
def test_drop_keys_never_drops_a_tokens_own_key(drop_keys):
    """So the first token of a chunk, which sees only itself, is what it is without dropout."""
    model = build(attention_dropout=0.9, drop_keys=drop_keys)
    tokens = torch.randint(0, 30, (20, 1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.train()(tokens)[0], model.eval()(tokens)[0]) == drop_keys


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["portable", "native"])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3, "hidden_dropout": 0.3, "attention_dropout": 0.3}])
def test_activation_checkpointing_changes_nothing(changes, dtype):
    tokens = torch.randint(0, 30, (2, 30), generator=torch.Generator().manual_seed(0))
    model, found = build(**changes).to(dtype), []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(0)
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
        (torch.zeros(1, 2), {}, r"int64 of shape \(B, L\), not torch.float32 of \(1, 2\)"),
        (torch.zeros(1, 2, dtype=torch.int32), {}, "not torch.int32"),
        (torch.zeros(2, dtype=torch.int64), {}, "int64 of shape"),
        (torch.zeros(1, 2, dtype=torch.int64), {"mask": torch.ones(1, 3, dtype=torch.bool)}, r"mask must be bool"),
        (torch.zeros(1, 2, dtype=torch.int64), {"mask": torch.ones(1, 2)}, r"mask must be bool.*not torch.float32"),
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
    assert (loaded.output.output.weight is loaded.embed.weight) == model.config.share_emb
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 4 * model.config.num_parameters + 10_000
    half = Megalodon.load(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(tokens)[0].dtype == torch.float32
    assert all(p.is_meta for p in Megalodon.load(tmp_path / "m", device="meta").parameters())


def test_one_configuration_has_one_fingerprint(tmp_path):
    """A whole number given for a float is the float that a file gives back."""
    model = Megalodon(ModelConfig(**{**ModelConfig.named("tiny").to_dict(), "rope_base": 10_000, "dropout": 0}))
    model.save(tmp_path)
    assert Megalodon.load(tmp_path).fingerprint() == model.fingerprint()


def test_fingerprint_changes_with_any_bit_of_a_weight_or_a_choice(tiny):
    """However the weight was changed: counted by PyTorch or behind its back."""
    model = copy.deepcopy(tiny)
    prints = {model.fingerprint()}
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            kept = parameter.view(-1)[1].clone()
            parameter.view(-1)[1] += 1
            prints.add(model.fingerprint())
            parameter.view(-1)[1] = kept
        assert len(prints) > 1, name
    for parameter in model.parameters():
        parameter.data += 1
    prints.add(model.fingerprint())
    other = Megalodon(ModelConfig.named("tiny", rope_base=5e3))
    other.load_state_dict(tiny.state_dict())
    prints.add(other.fingerprint())
    assert len(prints) == 3 + len(list(tiny.parameters()))
    other.load_state_dict(model.state_dict())
    assert other.fingerprint() not in prints


def test_fingerprint_is_computed_once(tiny, tmp_path, monkeypatch):
    """And not at all of a model that comes from a folder: loading it has verified it."""
    tiny.save(tmp_path)
    loaded = Megalodon.load(tmp_path)
    expected = tiny.fingerprint()
    monkeypatch.setattr(identity, "digest", None)
    assert loaded.fingerprint() == tiny.fingerprint() == expected


def test_an_edited_configuration_is_refused(tiny, tmp_path):
    tiny.save(tmp_path)
    for change in ({"rope_base": 500.0}, {"norm_eps": 1e-3}, {"chunk_size": 32}):
        ModelConfig.named("tiny", **change).save(tmp_path / "config.json")
        with pytest.raises(InputError, match=rf"config\.json was edited .*{next(iter(change))} = "):
            Megalodon.load(tmp_path)
    (tmp_path / "config.json").unlink()
    assert Megalodon.load(tmp_path).config == tiny.config


def test_a_flipped_bit_of_the_weights_is_refused_or_means_nothing(tiny, tmp_path):
    tiny.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    data, rng = weights.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    for place in [*(rng.randrange(header, len(data)) for _ in range(30)), *range(0, header, header // 50)]:
        altered = bytearray(data)
        altered[place] ^= 1 << place % 8
        weights.write_bytes(altered)
        loaded = None
        with contextlib.suppress(InputError):
            loaded = Megalodon.load(tmp_path)
        if loaded is not None:
            assert place < header
            assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), tiny.parameters(), strict=True))


def test_weights_of_other_programs_are_loaded_without_a_hash(tiny, tmp_path):
    tiny.save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt", "fingerprint": "of a sample"})
    ModelConfig.named("tiny", rope_base=500.0).save(tmp_path / "config.json")
    assert Megalodon.load(tmp_path).config.rope_base == 500


@pytest.mark.parametrize("at", ["before", "between", "after"])
def test_a_kill_while_a_model_replaces_another_leaves_one_of_them(tiny, tmp_path, monkeypatch, at):
    tiny.save(tmp_path)
    other = Megalodon(ModelConfig.named("tiny", chunk_size=32))
    written = []

    def until_killed(write):
        def killed(path, *what):
            if len(written) == ["before", "between", "after"].index(at):
                raise KeyboardInterrupt
            written.append(path)
            write(path, *what)

        return killed

    for name in ("write_tensors", "write_atomically"):
        monkeypatch.setattr(checkpoint, name, until_killed(getattr(checkpoint, name)))
    with contextlib.suppress(KeyboardInterrupt):
        other.save(tmp_path)
    expected = tiny if at == "before" else other
    assert Megalodon.load(tmp_path).fingerprint() == expected.fingerprint()


def test_a_head_of_its_own_is_not_dropped_silently(tiny, tmp_path):
    tiny.save(tmp_path)
    ModelConfig.named("tiny", share_emb=True).save(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit .*holds output\.output\.weight of its own"):
        Megalodon.load(tmp_path)


def test_unwritable_folder_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot create the folder"):
        tiny.save(tmp_path / "file" / "m")


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
    for text in ('{"num_layers": 0}', '{"layers": 2}', "[]", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            Megalodon.load(tmp_path)
    with pytest.raises(ValueError, match="not valid JSON"):
        Megalodon.load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        Megalodon.load(tmp_path)
