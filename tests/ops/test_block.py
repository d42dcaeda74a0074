"""Blocks that read in one call, against their ops one by one and against those in float64."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from megalodon_lm.config import ModelConfig
from megalodon_lm.model.assembly import build_block
from megalodon_lm.ops.block import read_block
from megalodon_lm.ops.cpu import block as native
from megalodon_lm.ops.cpu import squares
from megalodon_lm.state_spec import Sealed, named, tree_map

from .test_squares import KINDS, only

C = 48  # tokens of a chunk
ERROR = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # of the largest magnitude


@pytest.fixture(params=KINDS, autouse=True)
def dtype(request, monkeypatch):
    """Of products."""
    monkeypatch.setattr(squares, "available", only(*KINDS[request.param]))
    monkeypatch.setattr(native, "_free", [])
    return KINDS[request.param][1]


SIZES = {
    **dict(model_dim=64, num_heads=2, z_dim=64, value_dim=128, ffn_hidden_dim=96, cema_ndim=3, chunk_size=C),
    **dict(norm_num_groups=4, swiglu=True, num_layers=1),
}


def make(**changes):
    """A block of which every parameter matters."""
    config = ModelConfig.named("tiny", **{**SIZES, **changes})
    torch.manual_seed(0)
    block = build_block(config, 0)
    for part in block.modules():
        if hasattr(part, "init_weights"):
            part.init_weights()
    with torch.no_grad():
        for name, p in block.named_parameters():
            if name.endswith(("bias", "norm.weight", "mega.gamma", "mega.beta")):
                p.normal_(std=0.2)
    return block.eval()


def piece(length, seed=0):
    return torch.randn(2, length, 64, generator=torch.Generator().manual_seed(seed))


def read(block, x, state=None):
    narrow = squares.available(torch.bfloat16) is not None
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        return block(x, None if state is None else Sealed(state))


def read_by_modules(block, x, state=None):
    """As `read`, with somebody listening to one of them."""
    handle = block.mega.cema.register_forward_hook(lambda *_: None)
    try:
        return read(block, x, state)
    finally:
        handle.remove()


def in_float64(block, x, state=None):
    wide = copy.deepcopy(block).double()
    if state is not None:
        state = Sealed(tree_map(lambda t: t.double() if t.is_floating_point() else t, state))
    with torch.no_grad():
        return wide(x.double(), state)


def tensors(found):
    y, state = found
    return {"y": y, **dict(named(state))}


def error(found, expected):
    """Of the parts of what was found, largest difference over largest magnitude."""
    a, e = tensors(found), tensors(expected)
    assert a.keys() == e.keys()
    assert all(a[name].shape == e[name].shape for name in e)
    ratio = lambda x, y: (x - y).abs().max() / y.abs().max().clamp(min=1e-9)  # noqa: E731
    return {name: ratio(a[name].double(), e[name].double()).item() for name in e}


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel ran."""
    made, run = [], native.kernels.read
    monkeypatch.setattr(native.kernels, "read", lambda *args: made.append(1) or run(*args))
    return made


VARIANTS = [
    dict(),
    dict(swiglu=False),
    dict(residual="plain"),
    dict(heads_without_rope=1),
    dict(chunk_size=16, cema_ndim=4),
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(c) or "plain")
@pytest.mark.parametrize("before", [0, 20, C])
@pytest.mark.parametrize("length", [9, 70, 3 * C])
def test_outputs_and_states_are_those_of_float64(length, before, changes, calls, dtype):
    block = make(**changes)
    state = in_float64(block, piece(before, 1))[1] if before else None
    if state is not None:
        state = tree_map(lambda t: t.float() if t.dtype == torch.float64 and t.dim() > 2 else t, state)
    x = piece(length)
    found = read(block, x, state)
    assert len(calls) == 1
    expected, one_by_one = in_float64(block, x, state), read_by_modules(block, x, state)
    assert len(calls) == 1
    far, near = error(found, expected), error(one_by_one, expected)
    for name, limit in near.items():
        assert far[name] <= max(1.5 * limit, 1e-12), (name, far[name], limit)
        assert tensors(found)[name].dtype == tensors(one_by_one)[name].dtype
    assert far["y"] < ERROR[dtype]


@pytest.mark.parametrize("cut", [9, 30, C, 61, 100])
def test_a_cut_changes_nothing_but_roundings(cut, dtype):
    block, x = make(), piece(140)
    whole, state = read(block, x)
    first, entry = read(block, x[:, :cut])
    rest, leaving = read(block, x[:, cut:], entry)
    assert error((torch.cat([first, rest], 1), leaving), (whole, state))["y"] < ERROR[dtype] / 2
    assert max(error((rest, leaving), (whole[:, cut:], state)).values()) < ERROR[dtype] / 2


def test_rows_that_stand_at_different_places():
    """One in the middle of a chunk, one at the end of its second."""
    block, x = make(), piece(2 * C)
    entries = [read(block, piece(length, 1)[:1])[1] for length in (20, 2 * C - 1)]
    together = tree_map(lambda *rows: torch.cat(rows), *entries)
    y, state = read(block, x, together)
    for row, entry in enumerate(entries):
        alone = read(block, x[row : row + 1], entry)
        for name, t in tensors((y, state)).items():
            assert torch.equal(t[row : row + 1], tensors(alone)[name]), name


def test_a_row_does_not_depend_on_those_beside_it():
    block, x = make(), piece(70)
    y, state = read(block, x)
    alone, own = read(block, x[1:])
    for name, t in tensors((y, state)).items():
        assert torch.equal(t[1:], tensors((alone, own))[name]), name


@pytest.mark.parametrize("where", ["x", "keys", "weight"])
def test_not_finite_where_the_modules_are_not(where, calls):
    block, x = make(), piece(70)
    _, state = read(block, piece(20, 1))
    state = tree_map(torch.clone, state)
    if where == "x":
        x[0, 33, 5] = torch.nan
    elif where == "keys":
        state["attention"].keys[1, 3] = torch.inf
    else:
        with torch.no_grad():
            block.mega.wr.weight[7] = torch.nan
    found, expected = (tensors(run(block, x, state)) for run in (read, read_by_modules))
    assert len(calls) == 2  # of the state's piece, and of this
    for name, t in found.items():
        assert torch.equal(torch.isfinite(t), torch.isfinite(expected[name])), name
    assert not all(torch.isfinite(t).all() for t in found.values())


def test_what_was_changed_or_is_heard_goes_its_own_way(calls):
    block, x = make(), piece(70)
    read(block, x)
    assert len(calls) == 1
    for name in ("mega", "nffn", "mega.timenorm", "mega.attention", "mega.wv", "nffn.norm", "nffn.fc2"):
        seen, module = [], block.get_submodule(name)
        handles = [
            module.register_forward_hook(lambda *_, seen=seen: seen.append(1)),
            module.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1)),
        ]
        for handle in handles:
            read(block, x)
            handle.remove()
        assert seen == [1, 1, 1], name
    plain = read(block, x)[0]
    block.nffn.fc2 = Doubled(block.nffn.fc2)
    assert (read(block, x)[0] - plain).abs().max() > 0.1
    assert len(calls) == 2


class Doubled(nn.Module):
    """An adapter."""

    def __init__(self, inside):
        super().__init__()
        self.inside, self.weight, self.bias = inside, inside.weight, inside.bias

    def forward(self, x):
        return 2 * self.inside(x)


def test_a_changed_weight_counts_at_once():
    block, x = make(), piece(70)
    before = read(block, x)[0]
    for name in ("mega.wz", "mega.cema", "mega", "nffn.norm", "nffn.fc3"):
        block.get_submodule(name)
        with torch.no_grad():
            next(block.get_submodule(name).parameters(recurse=False)).add_(0.3)
        after = read(block, x)[0]
        assert not torch.equal(before, after), name
        assert error((after, {}), (read_by_modules(block, x)[0], {}))["y"] < 2e-2, name
        before = after


def test_memory_of_the_last_call_serves_no_two_at_once(calls):
    """Readers on several threads, of pieces of two lengths, whose results outlive the next call."""
    block = make()
    pieces = [piece(70, seed) for seed in range(12)] + [piece(40, seed) for seed in range(12)]
    expected = [tensors(read(block, x)) for x in pieces]
    kept = [{name: t.clone() for name, t in parts.items()} for parts in expected]
    with ThreadPoolExecutor(4) as pool:
        found = [tensors(parts) for parts in pool.map(lambda x: read(block, x), pieces)]
    for a, e, k in zip(found, expected, kept, strict=True):
        for name in e:
            assert torch.equal(e[name], k[name]), name
            assert torch.equal(a[name], e[name]), name


def test_large_scratch_does_not_stay(monkeypatch):
    block = make()
    read(block, piece(70))
    assert len(native._free) == 1
    monkeypatch.setattr(native, "KEPT_BYTES", 1 << 10)
    read(block, piece(70))
    assert not native._free


def test_the_portable_block_is_its_modules(dtype, monkeypatch):
    """On other devices, in other types, and where there are no squares."""
    monkeypatch.setattr(squares, "available", lambda dtype: None)
    block, x = make().to(dtype), piece(70).to(dtype)
    seen, portable = [], read_block.portable
    monkeypatch.setattr(read_block, "portable", lambda *a, **k: seen.append(1) or portable(*a, **k))
    with torch.inference_mode():
        found = block(x)
        handle = block.nffn.register_forward_hook(lambda *_: None)
        expected = block(x)
        handle.remove()
    assert seen == [1]
    for name, t in tensors(found).items():
        assert torch.equal(t, tensors(expected)[name]), name
