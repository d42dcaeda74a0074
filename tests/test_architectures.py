"""What holds for every architecture of the registry, and for one that is brought along from outside."""

import ast
import math
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megalodon_lm
from megalodon_lm import ModelConfig, State
from megalodon_lm.architectures import ARCHITECTURES, Architecture, build, config_class, config_of, load, load_config
from megalodon_lm.config import GECKO
from megalodon_lm.errors import InputError

BYTES = 259
ARCHITECTURES["leaky"] = Architecture("tests.leaky:LeakyConfig", "tests.leaky:Leaky")
EVERY = tuple(ARCHITECTURES)
_CHUNKED = {"chunk_size": 12}
SMALL = {"megalodon": _CHUNKED, "gecko": _CHUNKED, "mega": _CHUNKED, "llama": {"window": 12}}
"""Choices of an architecture that let much happen within few tokens."""
FEW = settings(max_examples=6, deadline=None)


def values(name, **changes):
    """A table [model], of two layers."""
    small = {"parameters": 100_000, "vocab_size": BYTES, "num_layers": 2}
    return {"architecture": name, **small, **SMALL.get(name, {}), **changes}


@lru_cache
def made(name, dtype=torch.float64, **changes):
    """A small model, away from the special values of the start."""
    torch.manual_seed(0)
    model = build(config_of(values(name, **changes)))
    with torch.no_grad():
        for _, p in model.named_parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.eval()
    return model.to(dtype)


def tokens(length, seed=0, batch=1):
    return torch.randint(0, BYTES, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(states, others, tolerance=1e-8):
    """Two states hold the same: counts exactly, everything else within a part of its largest value."""
    states, others = states.used(), others.used()
    assert states.keys() == others.keys()
    for name, t in states.items():
        assert t.shape == others[name].shape, name
        scale = tolerance * others[name].abs().max().clamp(min=1) if t.is_floating_point() and t.numel() else 0
        assert not t.numel() or (t - others[name]).abs().max() <= scale, name


@pytest.mark.parametrize("name", EVERY)
def test_reading_without_gradients_follows_a_fused_optimiser(name):
    """PyTorch does not count its writes: what reading in bf16 keeps of weights must go before a step."""
    torch.manual_seed(0)
    model = build(config_of(values(name))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    read, learnt = tokens(40, seed=1), tokens(40, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            before = model(read)[0]
        model(learnt[:, :-1], targets=learnt[:, 1:])[0].backward()
    optimizer.step()
    optimizer.zero_grad()
    another = build(config_of(values(name))).train()
    another.load_state_dict(model.state_dict())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        after = model(read)[0]
        assert torch.equal(after, another(read)[0])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("parameters", [100_000, 1_500_000, 20_000_000])
def test_a_wanted_number_of_parameters_is_met(name, parameters):
    config = config_of({"architecture": name, "parameters": parameters, "vocab_size": BYTES})
    assert abs(config.num_parameters / parameters - 1) <= 0.01
    assert config.vocab_size == BYTES
    assert config_of(config.to_dict()) == config


@pytest.mark.parametrize("name", EVERY)
def test_a_model_is_what_its_configuration_says(name):
    model = build(config_of(values(name)))
    assert sum(p.numel() for _, p in model.named_parameters()) == model.config.num_parameters
    state = model.empty_state(3)
    assert state.nbytes == model.state_bytes(3)
    assert state.position.tolist() == [0, 0, 0]
    spared = [(m, name) for m in model.modules() for name in getattr(m, "spared", ())]
    assert all(hasattr(module, name) for module, name in spared)


@pytest.mark.parametrize("name", EVERY)
def test_operations_are_those_of_all_products_with_weights_and_some_more(name):
    """How many more, the tests of each architecture say."""
    config = config_of(values(name, parameters=1_500_000, num_layers=6))
    with torch.device("meta"):
        model = build(config)
    linear = 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert linear <= config.flops_per_token() <= 2 * linear
    assert config.flops_per_token(backward=True) == pytest.approx(3 * config.flops_per_token(), rel=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_a_model_is_saved_and_loaded(name, tmp_path):
    model = build(config_of(values(name)))
    model.save(tmp_path)
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == model.config
    again = load(tmp_path)
    assert type(again) is type(model)
    assert again.fingerprint() == model.fingerprint()
    (tmp_path / "config.json").unlink()
    assert load(tmp_path).config == model.config


@pytest.mark.parametrize("name", EVERY)
def test_a_state_is_one_value(name, tmp_path):
    model = made(name)
    with torch.no_grad():
        _, state = model(tokens(30, batch=3), mask=torch.arange(30) < torch.tensor([[30], [7], [13]]))
        state.save(tmp_path / "a.state")
        more = tokens(5, 1, 3)
        expected, _ = model(more, state)
        for same in (State.load(tmp_path / "a.state", model), State.cat(state.split()), state.select([2, 0, 1])):
            order = [2, 0, 1] if same.position.tolist() == [13, 30, 7] else [0, 1, 2]
            found, _ = model(more[order], same)
            torch.testing.assert_close(found, expected[order], atol=1e-9, rtol=0)
    with pytest.raises(InputError, match="another model"):
        State.load(tmp_path / "a.state", made(name, torch.float32))


@st.composite
def pieces(draw):
    """Tokens (B, L), document starts, mask, and cuts, with empty pieces and single tokens."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    cuts = sorted(draw(st.lists(st.integers(0, length), min_size=1, max_size=4)))
    starts, mask = torch.rand(batch, length, generator=g) < 0.1, torch.rand(batch, length, generator=g) < 0.8
    return (
        torch.randint(0, BYTES, (batch, length), generator=g), starts if draw(st.booleans()) else None,
        mask if draw(st.booleans()) else None, cuts,
    )  # fmt: skip


def run(model, batch, cuts, starts, mask):
    """Logits and last state of the pieces between the cuts."""
    outputs, state, edges = [], None, [0, *cuts, batch.shape[1]]
    for a, b in pairwise(edges):
        part = [None if t is None else t[:, a:b] for t in (starts, mask)]
        logits, state = model(batch[:, a:b], state, document_starts=part[0], mask=part[1])
        outputs.append(logits)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("name", EVERY)
@FEW
@given(case=pieces())
def test_cut_anywhere(name, case):
    """A sequence may be cut anywhere and the result is the same, gradients too."""
    batch, starts, mask, cuts = case
    model, found = made(name), []
    weights = torch.randn(*batch.shape, BYTES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valid = torch.ones_like(batch, dtype=torch.bool) if mask is None else mask
    for at in ([], cuts):
        logits, state = run(model, batch, at, starts, mask)
        loss = (logits * weights * valid[..., None]).sum()
        found.append((logits[valid], state, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    (whole, expected, gradients), (cut, actual, of_cut) = found
    torch.testing.assert_close(cut, whole, atol=1e-8, rtol=0)
    close(actual, expected)
    for (parameter, _), a, b in zip(model.named_parameters(), gradients, of_cut, strict=True):
        assert (a is None) == (b is None), parameter
        assert a is None or (a - b).abs().max() <= 1e-7 * a.abs().max().clamp(min=1e-3), parameter


@pytest.mark.parametrize("name", EVERY)
@FEW
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_packed_and_padded_equal_separate(name, lengths, seed):
    model = made(name)
    documents = [tokens(n, seed + i) for i, n in enumerate(lengths)]
    starts = torch.cat([torch.arange(n)[None] == 0 for n in lengths], 1)
    mask = torch.zeros(len(lengths), max(lengths) + 2, dtype=torch.bool)
    batch = torch.zeros(mask.shape, dtype=torch.int64)
    for row, document in enumerate(documents):
        g = torch.Generator().manual_seed(row)
        places = torch.randperm(mask.shape[1], generator=g)[: document.shape[1]].sort().values
        mask[row, places], batch[row, places] = True, document[0]
    with torch.no_grad():
        separate = [model(document) for document in documents]
        packed, last = model(torch.cat(documents, 1), document_starts=starts)
        padded, each = model(batch, mask=mask)
    torch.testing.assert_close(packed, torch.cat([logits for logits, _ in separate], 1), atol=1e-8, rtol=0)
    close(last, separate[-1][1])
    for row, (logits, state) in enumerate(separate):
        torch.testing.assert_close(padded[row, mask[row]], logits[0], atol=1e-8, rtol=0)
        close(each.select([row]), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", EVERY)
def test_nothing_leaks(name, dtype):
    """From later tokens, other documents, other rows and padding no gradient comes that is not exactly zero."""
    model, seen = made(name, dtype), []
    _, entry = model(tokens(20, 2, 2))
    entry = entry.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
    starts, mask = torch.zeros(2, 40, dtype=torch.bool), torch.ones(2, 40, dtype=torch.bool)
    starts[:, [9, 21]], mask[0, [4, 24, 25]] = True, False
    handle = model.embed.register_forward_hook(lambda m, i, out: seen.append(out) or out.retain_grad())
    logits, exit_state = model(tokens(40, batch=2), entry, document_starts=starts, mask=mask)
    handle.remove()
    carried = [t for t in entry.tensors().values() if t.requires_grad]
    (before,) = torch.autograd.grad(logits[:, 8].square().sum(), carried[:1], retain_graph=True)
    assert before.any()
    inputs = [seen[0], *carried]
    flows, *into = torch.autograd.grad(logits[0, 30].square().sum(), inputs, retain_graph=True, allow_unused=True)
    reached = flows.abs().sum(-1) != 0  # the hook sees the rows with their padding moved to the end
    assert not any(g is not None and g.any() for g in into)
    assert reached[0, 27]
    assert not reached[0, 28:].any()
    assert not reached[0, :20].any()
    assert not reached[1].any()
    leaving = [t[0].square().sum() for t in exit_state.tensors().values() if t.requires_grad]
    flows, *into = torch.autograd.grad(sum(leaving), inputs, allow_unused=True)
    assert not any(g is not None and g.any() for g in into)
    reached = flows.abs().sum(-1) != 0
    assert reached[0, 36]
    assert not reached[0, :20].any()
    assert not reached[0, 37:].any()
    assert not reached[1].any()


def test_a_megalodon_is_what_has_no_name():
    assert config_of({}) == ModelConfig()
    assert "architecture" not in ModelConfig().to_dict()
    assert config_of({"architecture": "gecko", "num_layers": 3}) == ModelConfig(num_layers=3, **GECKO)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"architecture": "lama"}, "unknown architecture 'lama'"),
        ({"architecture": 3}, "unknown architecture 3"),
        ({"parameters": 0, "vocab_size": BYTES}, "parameters = 0 must be"),
        ({"parameters": 1_000_000}, "needs vocab_size"),
        ({"parameters": 1_000_000, "vocab_size": 32_000}, "nearest is 2,"),
        ({"parameters": 1_000_000, "vocab_size": BYTES, "model_dim": 64}, "model_dim = 64 follows from parameters"),
        ({"parameters": 1_000_000, "vocab_size": BYTES, "num_heads": "2"}, "num_heads = '2' must be of type int"),
    ],
)
def test_what_cannot_be_had_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        config_of(given)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", [name for name in EVERY if hasattr(config_class(name), "norm_eps")])
def test_an_epsilon_that_no_norm_can_add_is_refused(name, value):
    with pytest.raises(InputError, match=r"norm_eps = .* must be positive and finite"):
        config_of(values(name, norm_eps=value))


def asks(source):
    """Lines of a source that compare something with the name of an architecture; a model_type is of transformers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare | ast.MatchValue) and "model_type" not in ast.unparse(node):
            texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            found += [node.lineno] * bool(texts & set(ARCHITECTURES))
    return found


def test_the_guard_sees_every_form_of_asking():
    for source in (
        "a.architecture == 'gecko'", "if 'megalodon' != name: pass", "name in ('other', 'gecko')",
        "match name:\n    case 'leaky':\n        pass",
    ):  # fmt: skip
        assert asks(source)
    assert not asks("{'gecko': 3}['gecko']; name == 'other'")


def test_nobody_asks_which_architecture_it_has():
    """But for the registry and the baselines themselves; the benchmark's names are those of its contenders."""
    package = Path(megalodon_lm.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "architectures.py" and path.parent.name not in ("baselines", "benchmark"):
            assert not asks(path.read_text(encoding="utf-8")), path
