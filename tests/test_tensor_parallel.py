"""A model cut over tensor ranks is the one process's: loss, logits, every gradient and the State.

In float64 the portable ops run, in float32 and bf16 the native ones.
"""

from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megalodon_lm import Megalodon, ModelConfig, State
from megalodon_lm.config import GECKO, LATER_GECKO
from megalodon_lm.errors import InputError
from megalodon_lm.parallel.tensor import apply_tensor_parallel
from megalodon_lm.parallel.tensor_state import gather_state, share_state

from .ranks import run_ranks
from .test_cut_invariant import CHUNK, build

MODELS = {
    "Megalodon": {},
    "Gecko": {**GECKO, "vocab_size": 31, "heads_without_rope": 3},  # no whole shares of the vocabulary
    "LayerNorm": {"attention_norm": "layer", "swiglu": False, "rescale_nffn": True, "heads_without_rope": 1},
    "later Gecko": {**LATER_GECKO, "attention_norm": "layer"},
    "no average": {"cema": "none", "share_emb": True, "scale_emb": True},
    "neither": {"cema": "none", "attention_norm": "layer", "normalize_attention": False},
    "later Gecko over time": LATER_GECKO,
}
FEW = [(name, "float64") for name in ("Megalodon", "Gecko", "LayerNorm")]
FEW += [("Megalodon", "float32"), ("Gecko", "bf16")]
CASES = [*((name, "float64") for name in MODELS), *product(("Megalodon", "Gecko"), ("float32", "bf16"))]
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bf16": 0.06}
"""Relative, of gradients and logits. In bf16 against float64: one process is off by up to 0.03."""
LENGTHS = (CHUNK + 5, 2 * CHUNK)


def made(name, kind):
    return build(torch.float64 if kind == "float64" else torch.float32, num_heads=4, **MODELS[name])


def passed(model, kind):
    """Losses of both kinds and logits of two pieces, packed and padded, with the State carried; the last State."""
    drawing = torch.Generator().manual_seed(0)
    tokens, length = torch.randint(0, 30, (2, sum(LENGTHS) + 1), generator=drawing), sum(LENGTHS)
    starts, mask, learnt = (torch.rand(2, length, generator=drawing) < share for share in (0.05, 0.8, 0.7))
    tensors = [t.split(LENGTHS, 1) for t in (tokens[:, :-1], tokens[:, 1:], starts, mask, learnt)]
    (first, second), targets, starts, mask, learnt = tensors
    autocast = torch.autocast("cpu", torch.bfloat16) if kind == "bf16" else nullcontext()
    with autocast:
        mean, state = model(first, targets=targets[0], document_starts=starts[0], mask=mask[0])
        given = {"document_starts": starts[1], "mask": mask[1]}
        each, after = model(second, state, targets=targets[1], learnt=learnt[1], reduction="none", **given)
        logits, _ = model(second, state, **given)
    logits = logits[mask[1]]
    return mean + each.square().mean() + logits.square().mean(), logits, after


def whole(p):
    return p.grad.full_tensor()


def found_on(model, kind, mesh, is_first):
    """What ranks make of a model, whole; and what must hold on each of them."""
    plain = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, given: plain.extend(type(t) for t in given if torch.is_tensor(t)))
    loss, logits, state = passed(model, kind)
    loss.backward()
    assert set(plain) == {torch.Tensor}, plain
    gathered = gather_state(state, model, mesh)
    for name, t in share_state(gathered, model, mesh).tensors().items():
        assert torch.equal(t, state.tensors()[name]), name
    gradients = {n: whole(p) for n, p in model.named_parameters()}
    return {"loss": loss, "logits": logits, "gradients": gradients, "state": gathered.tensors()} if is_first else None


def trained(model, mesh):
    """Losses of a few steps, with gradients and without them after each: what reading keeps of weights must go."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), []
    for _ in range(3):
        optimizer.zero_grad()
        loss, _, _ = passed(model, "float32")
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            losses += [loss.item(), passed(model, "bf16")[0].item()]
    return losses


def work(rank, cases, shape):
    mesh, found = init_device_mesh("cpu", shape, mesh_dim_names=("shard", "tensor")), {}
    for name, kind in cases:
        model = made(name, kind)
        apply_tensor_parallel(model, mesh["tensor"])
        if shape[0] > 1:
            for block in (*model.layers, model):
                fully_shard(block, mesh=mesh["shard"])
        found[name, kind] = found_on(model, kind, mesh["tensor"], rank == 0)
    if shape[0] == 1:
        model = made("Megalodon", "float32")
        apply_tensor_parallel(model, mesh["tensor"])
        found["trained"] = trained(model, mesh)
    return found


def run(cases, shape):
    return run_ranks(work, shape[0] * shape[1], cases, shape, timeout=500)[0]


@pytest.fixture(scope="module")
def two():
    return run(FEW, (1, 2))


def compare(found, name, kind):
    model = made(name, kind).to(torch.float64)
    loss, logits, state = passed(model, "float64")
    loss.backward()
    expected = {"loss": loss, "logits": logits, **{n: p.grad for n, p in model.named_parameters()}}
    actual = {"loss": found["loss"], "logits": found["logits"], **found["gradients"]}
    assert actual.keys() == expected.keys()
    for n, e in expected.items():
        error = ((actual[n] - e).norm() / e.norm()).item()
        assert error < TOLERANCES[kind], (n, error)
    for n, e in state.tensors().items():
        error = ((found["state"][n] - e).double().norm() / e.double().norm().clamp(min=1e-9)).item()
        assert found["state"][n].shape == e.shape, n
        assert error < TOLERANCES[kind], (n, error)


@pytest.mark.parametrize(("name", "kind"), FEW)
def test_two_ranks_are_one_process(two, name, kind):
    compare(two[name, kind], name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2), (1, 4), (2, 2)], ids=["2 ranks", "4 ranks", "2 x 2, sharded"])
def test_ranks_are_one_process(shape):
    found = run(CASES, shape)
    for name, kind in CASES:
        compare(found[name, kind], name, kind)


def test_steps_and_readings_between_them_follow_one_process(two):
    losses = trained(made("Megalodon", "float32"), None)
    assert losses[0] - losses[-2] > 0.1  # it learns, so that old weights would tell
    torch.testing.assert_close(two["trained"][::2], losses[::2], rtol=1e-5, atol=0)
    torch.testing.assert_close(two["trained"][1::2], losses[1::2], rtol=5e-3, atol=0)


def test_a_gathered_state_is_saved_and_read_on_with_by_one_process(two, tmp_path):
    model = made("Megalodon", "float64")
    State.from_tensors(two["Megalodon", "float64"]["state"], model).save(tmp_path / "state")
    more, expected = torch.zeros(2, 3, dtype=torch.int64), passed(model, "float64")[2]
    for a, e in zip(*(model(more, s)[0] for s in (State.load(tmp_path / "state", model), expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "changes", "said"),
    [
        (2, {}, "2 tensor ranks cannot share 1 attention heads: this model can be cut over 1;"),
        (4, {"num_heads": 8, "norm_num_groups": 2}, "4 .* 2 groups .* over 1, 2;"),
        (3, {"num_heads": 6, "z_dim": 48, "value_dim": 96, "norm_num_groups": 2}, "3 .* 2 groups .* over 1, 2;"),
        (4, {"num_heads": 4, "ffn_hidden_dim": 6}, "4 .* 6 hidden features .* over 1, 2;"),
        (4, {"num_heads": 4, "vocab_size": 5}, "4 tensor ranks cannot share a vocabulary of 5"),
    ],
)
def test_what_cannot_be_cut_is_refused(size, changes, said):
    with torch.device("meta"):
        model = Megalodon(ModelConfig.named("tiny", **changes))
    with pytest.raises(InputError, match=said):
        apply_tensor_parallel(model, SimpleNamespace(size=lambda: size))


def test_other_architectures_are_refused():
    from megalodon_lm.baselines.mamba import Mamba, MambaConfig

    with torch.device("meta"):
        model = Mamba(MambaConfig(num_layers=1))
    with pytest.raises(InputError, match=r"no rule for .* in a Mamba"):
        apply_tensor_parallel(model, SimpleNamespace(size=lambda: 2))
