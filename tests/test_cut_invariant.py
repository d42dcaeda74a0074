"""A sequence may be cut anywhere and the result is the same."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalodon_lm import Megalodon, ModelConfig, State

CHUNK = 12
FAST = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def build(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    small = {"model_dim": 32, "z_dim": 16, "value_dim": 32, "ffn_hidden_dim": 32, "cema_ndim": 4, "num_heads": 2}
    model = Megalodon(ModelConfig.named("tiny", vocab_size=30, chunk_size=CHUNK, **small, **changes))
    with torch.no_grad():  # away from the special values of the start
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


MODEL = build()


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
    for a, b in zip(edges, edges[1:], strict=False):
        part = [None if t is None else t[:, a:b] for t in (starts, mask)]
        logits, state = model(tokens[:, a:b], state, document_starts=part[0], mask=part[1])
        outputs.append(logits)
    return torch.cat(outputs, 1), state


def check(model, case, packed, padded, tolerance):
    tokens, starts, mask, cuts = case
    starts, mask = starts if packed else None, mask if padded else None
    with torch.no_grad():
        whole, expected = run(model, tokens, [], starts, mask)
        cut, actual = run(model, tokens, cuts, starts, mask)
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    torch.testing.assert_close(cut[valid], whole[valid], atol=tolerance, rtol=0)
    expected = expected.tensors()
    for name, t in actual.tensors().items():
        torch.testing.assert_close(t, expected[name], atol=10 * tolerance, rtol=10 * tolerance, msg=name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@FAST
@given(case=pieces())
def test_cut_anywhere_in_float64(case, packed, padded):
    check(MODEL, case, packed, padded, 1e-9)


@pytest.mark.parametrize(("packed", "padded"), [(False, False), (True, True)])
@FAST
@given(case=pieces())
def test_cut_anywhere_in_float32(case, packed, padded):
    check(build(torch.float32), case, packed, padded, 2e-4)


@FAST
@given(case=pieces())
def test_cut_anywhere_in_bf16(case):
    """bf16 keeps 8 bits: a rounding of 2^-9 of logits of size about 4, after two layers, stays below 0.15."""
    tokens, _, _, cuts = case
    model = build(torch.bfloat16)
    with torch.no_grad():
        difference = run(model, tokens, cuts)[0] - run(model, tokens, [])[0]
    assert difference.abs().max() < 0.15


@settings(max_examples=10, deadline=None)
@given(case=pieces(), packed=st.booleans(), padded=st.booleans())
def test_gradients_carried_across_the_cut_are_those_of_the_whole(case, packed, padded):
    tokens, starts, mask, cuts = case
    starts, mask = starts if packed else None, mask if padded else None
    weight = torch.randn(*tokens.shape, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if mask is not None:
        weight = weight * mask[..., None]
    found = []
    for at in ([], cuts):
        logits, _ = run(MODEL, tokens, at, starts, mask)
        found.append(torch.autograd.grad((logits * weight).sum(), list(MODEL.parameters()), allow_unused=True))
    for (name, _), whole, cut in zip(MODEL.named_parameters(), *found, strict=True):
        if whole is None or cut is None:
            assert whole is cut, name
        else:
            scale = whole.abs().max().clamp(min=1e-6)
            assert (whole - cut).abs().max() / scale < 1e-8, name


def test_an_empty_piece_changes_nothing():
    empty = torch.zeros(2, 0, dtype=torch.int64)
    _, state = MODEL(torch.zeros(2, 5, dtype=torch.int64))
    logits, after = MODEL(empty, state)
    assert logits.shape == (2, 0, 30)
    assert after is state
    _, fresh = MODEL(empty)
    assert isinstance(fresh, State)
    assert fresh.position.tolist() == [0, 0]
