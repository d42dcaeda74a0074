import pytest
import torch

from megalodon_lm.ops import attention, bins, reference, windowed_attention
from megalodon_lm.ops.attention import causal_attention
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.chunk_attention import KeyValueCache
from megalodon_lm.ops.chunk_attention import chunk_attention as op

from .cases import BOUNDARIES, assert_close, boundaries, gradients, sampled

chunk_attention = op.portable

B, H, DK, DV, C = 3, 2, 4, 6, 16


def case(length, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, length, H, DK), (B, length, H, DK), (B, length, H, DV), (B, C, H, DK), (B, C, H, DV)]
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


def run(op, where, fill):
    def call(q, k, v, keys, values):
        used = (torch.arange(C) < fill[:, None])[..., None, None]
        cache = KeyValueCache(torch.where(used, keys, 0), torch.where(used, values, 0), fill)
        out, leaving = op(q, k, v, C, 1e4, cache, where)
        call.fill = leaving.fill
        return out, leaving.keys, leaving.values

    return call


@pytest.mark.parametrize(
    ("kind", "fill", "length"), sampled(BOUNDARIES, [(0, 0, 0), (5, 5, 5), (3, 15, 0)], [1, 7, 16, 50])
)
def test_equals_reference_with_all_gradients(kind, fill, length, monkeypatch):
    monkeypatch.setattr(attention, "TILE_SIZE", 5)
    where, fill = boundaries(kind, B, length), torch.tensor(fill)
    fast, slow = run(chunk_attention, where, fill), run(reference.chunk_attention, where, fill)
    actual, expected = gradients(fast, case(length)), gradients(slow, case(length))
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-11)
    assert torch.equal(fast.fill, slow.fill)


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("length", [4, 50])
def test_layout_of_graphs_equals_reference_with_all_gradients(kind, length, monkeypatch):
    """What is taken where a graph lets no value decide a shape; here without one, in several tiles."""
    monkeypatch.setattr(attention, "TILE_SIZE", 5)
    monkeypatch.setattr(windowed_attention, "_in_bins", windowed_attention._in_graph)
    where, fill = boundaries(kind, B, length), torch.tensor([3, 15, 0])
    actual = gradients(run(chunk_attention, where, fill), case(length))
    expected = gradients(run(reference.chunk_attention, where, fill), case(length))
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-11)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in case(20)]
    fill = torch.tensor([3, 15, 0])
    assert torch.autograd.gradcheck(run(chunk_attention, None, fill), inputs, fast_mode=True)
    assert torch.autograd.gradcheck(run(chunk_attention, None, fill * 0 + 4), inputs, fast_mode=True)


@pytest.mark.parametrize("drop_keys", [False, True])
def test_dropout_keeps_the_mean_and_is_not_idle(drop_keys):
    torch.manual_seed(0)
    q = torch.zeros(1, 8, 1, 4)
    v = torch.ones(1, 8, 1, 4)
    draws = torch.cat([causal_attention(q, q, v, 0.5, drop_keys) for _ in range(2000)])
    spread, mean = draws.std(0).max(), draws.mean(0)
    if drop_keys:  # weights of the kept keys still sum to 1
        torch.testing.assert_close(draws, torch.ones_like(draws))
        v = torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 1, 4)
        assert torch.cat([causal_attention(q, q, v, 0.5, True) for _ in range(100)]).std(0).max() > 0.1
    else:
        assert spread > 0.1
        torch.testing.assert_close(mean, torch.ones_like(mean), atol=0.1, rtol=0)


def test_one_row_of_no_tokens_leaves_the_cache():
    fill = torch.tensor([3, 15, 2])
    q, k, v, keys, values = case(4)
    cache = KeyValueCache(keys, values, fill)
    where = boundaries("padding", B, 4)
    _, leaving = chunk_attention(q, k, v, C, 1e4, cache, where)
    assert torch.equal(leaving.keys[-1, :2], keys[-1, :2])
    assert leaving.fill[-1] == 2


def test_no_token_at_all():
    inputs = case(4)
    fill, where = torch.tensor([3, 15, 0]), Boundaries(None, torch.zeros(B, dtype=torch.int64))
    out, keys, values = run(chunk_attention, where, fill)(*inputs)
    assert not out.any()
    assert torch.equal(keys[1, :15], inputs[3][1, :15])
    assert torch.equal(values[1, :15], inputs[4][1, :15])


@pytest.mark.parametrize("merged", [1, 3, 100])
def test_documents_of_all_lengths_share_bins(merged, monkeypatch):
    monkeypatch.setattr(bins, "MERGED_KEYS", merged)
    starts = torch.zeros(B, 60, dtype=torch.bool)
    starts[:, torch.tensor([0, 1, 2, 5, 12, 13, 40])] = True
    starts[1, 0] = False
    where, fill = Boundaries(starts), torch.tensor([3, 15, 0])
    actual = gradients(run(chunk_attention, where, fill), case(60))
    expected = gradients(run(reference.chunk_attention, where, fill), case(60))
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-11)
