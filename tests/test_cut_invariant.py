"""A sequence may be cut anywhere and the result is the same.

In float64 the portable operators run, in float32 and bf16 the native ones.
"""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm import Megalodon, ModelConfig, State

CHUNK = 12
FAST = settings(max_examples=25, deadline=None)


def build(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    small = {"model_dim": 32, "z_dim": 16, "value_dim": 32, "ffn_hidden_dim": 32, "cema_ndim": 4, "num_heads": 2}
    model = Megalodon(ModelConfig.named("tiny", **{**small, "vocab_size": 30, "chunk_size": CHUNK, **changes}))
    with torch.no_grad():  # away from the special values of the start
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


MODEL = build()
FLOAT32 = build(torch.float32)


@st.composite
def pieces(draw):
    """Tokens (B, L), document starts, mask, and the cuts: random, with empty pieces and single tokens."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 4 * CHUNK))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    if draw(st.booleans()) and length > 1:
        at = draw(st.integers(0, length - 1))
        cuts = sorted([*cuts, at, at + 1])
    tokens = torch.randint(0, 30, (batch, length), generator=g)
    starts = torch.rand(batch, length, generator=g) < 0.1
    mask = torch.rand(batch, length, generator=g) < 0.8
    return tokens, starts, mask, cuts


def run(model, tokens, cuts, starts=None, mask=None):
    """Logits and last state of the pieces between the cuts."""
    outputs, state, edges = [], None, [0, *cuts, tokens.shape[1]]
    for a, b in pairwise(edges):
        part = [None if t is None else t[:, a:b] for t in (starts, mask)]
        logits, state = model(tokens[:, a:b], state, document_starts=part[0], mask=part[1])
        outputs.append(logits)
    return torch.cat(outputs, 1), state


def check(model, case, packed, padded, tolerance, of_states=None):
    """Logits within an absolute tolerance; states within one of their largest value, counts exactly."""
    tokens, starts, mask, cuts = case
    starts, mask = starts if packed else None, mask if padded else None
    with torch.no_grad():
        whole, expected = run(model, tokens, [], starts, mask)
        cut, actual = run(model, tokens, cuts, starts, mask)
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(cut[valid], whole[valid], atol=tolerance, rtol=0)
    expected = expected.tensors()
    for name, t in actual.tensors().items():
        scale = expected[name].abs().max().clamp(min=1)
        allowed = (of_states or 10 * tolerance) if t.is_floating_point() else 0
        assert ((t - expected[name]).abs().max() / scale).item() <= allowed, name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@FAST
@given(case=pieces())
def test_cut_anywhere_in_float64(case, packed, padded):
    """A sequence may be cut anywhere and the result is the same."""
    check(MODEL, case, packed, padded, 1e-9)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@FAST
@given(case=pieces())
def test_cut_anywhere_in_float32(case, packed, padded):
    """A sequence may be cut anywhere and the result is the same."""
    check(FLOAT32, case, packed, padded, 2e-4)


@pytest.mark.parametrize("autocast", [False, True])
@FAST
@given(case=pieces(), packed=st.booleans(), padded=st.booleans())
def test_cut_anywhere_in_bf16(case, packed, padded, autocast):
    """A sequence may be cut anywhere and the result is the same, up to the rounding of bf16.

    Logits are up to 7, where bf16 rounds by up to 2^-7 = 0.016. Over 600 random cases cut and whole differed by at most
    0.08 in logits and 0.02 of the largest value in states; both differed by up to 0.12 from a float64 model of the same
    weights. So the cut costs less than the rounding does, and twice the measured differences is allowed.
    """
    model = FLOAT32 if autocast else build(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        check(model, case, packed, padded, 0.16, of_states=0.04)


@pytest.mark.parametrize(("model", "tolerance"), [(MODEL, 1e-9), (FLOAT32, 2e-4)], ids=["float64", "float32"])
def test_every_place_of_a_cut(model, tolerance):
    """A sequence may be cut anywhere and the result is the same: here at every place, and at all of them at once."""
    length = 2 * CHUNK + 3
    tokens = torch.randint(0, 30, (2, length), generator=torch.Generator().manual_seed(0))
    for cuts in [*([at] for at in range(length + 1)), list(range(length))]:
        check(model, (tokens, None, None, cuts), False, False, tolerance)


@pytest.mark.parametrize(("model", "tolerance"), [(MODEL, 1e-9), (FLOAT32, 2e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize(("packed", "padded"), [(False, False), (True, True)])
def test_pieces_longer_than_the_strips_of_the_operators(model, tolerance, packed, padded):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 30, (2, 400), generator=g)
    starts, mask = torch.rand(2, 400, generator=g) < 0.01, torch.rand(2, 400, generator=g) < 0.9
    check(model, (tokens, starts, mask, [130, 131, 323]), packed, padded, tolerance)


def gradients_of_cut_and_whole(model, case, packed, padded):
    """(name, whole, cut) of every parameter, for a random projection of all valid logits."""
    tokens, starts, mask, cuts = case
    starts, mask = starts if packed else None, mask if padded else None
    dtype = next(model.parameters()).dtype
    weight = torch.randn(*tokens.shape, 30, generator=torch.Generator().manual_seed(0), dtype=dtype)
    if mask is not None:
        weight = weight * mask[..., None]
    found = []
    for at in ([], cuts):
        logits, _ = run(model, tokens, at, starts, mask)
        grads = torch.autograd.grad((logits * weight).sum(), list(model.parameters()), allow_unused=True)
        found.append([torch.zeros(()) if g is None else g for g in grads])
    return zip([n for n, _ in model.named_parameters()], *found, strict=True)


@settings(max_examples=20, deadline=None)
@given(case=pieces(), packed=st.booleans(), padded=st.booleans())
def test_gradients_carried_across_the_cut_are_those_of_the_whole(case, packed, padded):
    """A sequence may be cut anywhere and the result is the same, gradients too."""
    for name, whole, cut in gradients_of_cut_and_whole(MODEL, case, packed, padded):
        assert (whole - cut).abs().max() <= 1e-8 * whole.abs().max().clamp(min=1e-6), name


@settings(max_examples=20, deadline=None)
@given(case=pieces(), packed=st.booleans(), padded=st.booleans())
def test_gradients_carried_across_the_cut_in_float32(case, packed, padded):
    """A sequence may be cut anywhere and the result is the same, gradients of the native operators too."""
    for name, whole, cut in gradients_of_cut_and_whole(FLOAT32, case, packed, padded):
        assert (whole - cut).abs().max() <= 5e-5 * whole.abs().max().clamp(min=1), name


def test_an_empty_piece_changes_nothing():
    empty = torch.zeros(2, 0, dtype=torch.int64)
    _, state = MODEL(torch.zeros(2, 5, dtype=torch.int64))
    logits, after = MODEL(empty, state)
    assert logits.shape == (2, 0, 30)
    assert after is state
    _, fresh = MODEL(empty)
    assert isinstance(fresh, State)
    assert fresh.position.tolist() == [0, 0]
