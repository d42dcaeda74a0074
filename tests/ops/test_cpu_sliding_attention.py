import pytest
import torch

from megalodon_lm.ops import reference
from megalodon_lm.ops.cpu import batched_attention, causal_attention, squares, tiled_attention
from megalodon_lm.ops.cpu.sliding_attention import sliding_attention
from megalodon_lm.ops.sliding_attention import SlidingCache
from megalodon_lm.ops.sliding_attention import sliding_attention as op
from megalodon_lm.ops.windowed_attention import Window

from .cases import BOUNDARIES, assert_close, boundaries, gradients, sampled
from .test_cpu_chunk_attention import TOLERANCE, WIDTHS
from .test_sliding_attention import DK, DV, POSITIONS, B, C, case, run

portable = op.portable


def inputs_of(length, dtype, dk=DK, dv=DV, chunk_size=C):
    """Normal; in bf16 so that scores, and products of outputs and gradients, are as large at every width."""
    drawn = case(length, torch.float64, chunk_size, dk, dv)
    if dtype == torch.bfloat16:
        drawn = [t * (DV / dv) ** 0.5 if i in (2, 4) else t * (DK / dk) ** 0.25 for i, t in enumerate(drawn)]
    return [t.to(dtype) for t in drawn]


def compare(where, position, inputs, chunk_size=C, slow=reference.sliding_attention, **choices):
    fast, slow = (run(f, where, position, chunk_size, **choices) for f in (sliding_attention, slow))
    actual, expected = gradients(fast, inputs), gradients(slow, [t.double() for t in inputs])
    of_piece = gradients(fast, inputs, asked=3)[1]  # a cache that is carried on as it is
    pairs = [*zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)]
    pairs += zip(of_piece, expected[1][:3], strict=True)
    for i, (a, e) in enumerate(pairs):
        scale = e.abs().max().clamp(min=1)  # the gradient of the score of a lone key is 0 up to rounding
        assert ((a - e).abs().max() / scale).item() <= TOLERANCE[inputs[0].dtype], i
    assert all(a.dtype == inputs[0].dtype for a in actual[0] + actual[1])
    assert fast.where == slow.where


@pytest.fixture(autouse=True)
def by_products_of_pytorch(monkeypatch):
    """What squares compute is tested in test_squares.py."""
    monkeypatch.setattr(squares, "available", lambda dtype: None)


@pytest.mark.parametrize(
    ("kind", "position", "length", "dtype", "sizes", "widths"),
    sampled(BOUNDARIES, POSITIONS, [1, 7, 50], TOLERANCE, [(0, 5), (4, 20)], WIDTHS),
)
def test_equals_reference_with_all_gradients(kind, position, length, dtype, sizes, widths, monkeypatch):
    monkeypatch.setattr(tiled_attention, "TILE_SIZE", 5)
    monkeypatch.setattr(batched_attention, "TOGETHER", 60)
    monkeypatch.setattr(causal_attention, "FEW_QUERIES", sizes[0])
    monkeypatch.setattr(causal_attention, "MERGED_KEYS", sizes[1])
    compare(boundaries(kind, B, length), position, inputs_of(length, dtype, *widths))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", BOUNDARIES)
def test_merged_documents_and_long_chunks_equal_the_portable_path(kind, dtype):
    """Default tiles: several short documents in one, chunks of more than a tile, widths that fill no vector."""
    compare(boundaries(kind, B, 1000), (17, 1299, 0), inputs_of(1000, dtype, 18, 34, 300), 300, portable)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chunks_of_one_shape_see_more_or_less_of_the_cache(dtype, monkeypatch):
    """The second ones of the rows see 31, 8 and 2 entries, and give them gradients where those are asked for alone."""
    monkeypatch.setattr(causal_attention, "MERGED_KEYS", 1)
    compare(None, (31, 40, 66), inputs_of(150, dtype, 18, 34, 32), 32)


def test_without_cache():
    inputs = inputs_of(40, torch.float32)[:3]
    out, leaving = op(*inputs, C, 1e4)
    expected, entry = portable(*(t.double() for t in inputs), C, 1e4)
    assert op.implementation(*inputs, C, 1e4) is sliding_attention
    assert_close([out, *leaving[:2]], [expected, *entry[:2]], 1e-5)
    assert (leaving.fill.tolist(), leaving.position.tolist()) == ([8, 8, 8], [40, 40, 40])


@pytest.mark.parametrize("size", [64, 512])
def test_costs_keys_of_two_chunks_and_no_more(size):
    """Pairs of queries and keys that are multiplied, and what is kept for backward, grow as the length does."""
    pairs, held = [], []
    for length in (2048, 8192):
        slots = Window(size, size).slots(torch.arange(length))[None]
        _, groups = causal_attention._plan(slots)
        queries = groups[:, 2] - groups[:, 1]
        pairs.append((queries * (queries + groups[:, 3])).sum())
        inputs, saved = [torch.zeros(1, length, 1, 4).requires_grad_() for _ in range(3)], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # noqa: B023
            sliding_attention(*inputs, size, 1e4)
        held.append(sum(saved))
    assert pairs[0] <= 2048 * (2 * size + causal_attention.MERGED_KEYS)
    assert pairs[1] <= 4.1 * pairs[0]
    assert held[1] <= 4 * held[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_is_bitwise_repeatable(dtype):
    call = run(sliding_attention, boundaries("both", B, 700), (3, 15, 0), 256)
    once, again = (gradients(call, inputs_of(700, dtype, 32, 96, 256)) for _ in range(2))
    for a, b in zip(once[0] + once[1], again[0] + again[1], strict=True):
        assert torch.equal(a, b)


def test_operator_is_well_formed():
    q, k, v, keys, values = (t.requires_grad_() for t in inputs_of(20, torch.float32))
    slots = Window(C, C).slots(torch.tensor([[5], [29], [8]]) + torch.arange(20))
    torch.library.opcheck(causal_attention.attention_forward, (q, k, v, keys, values, slots))


def test_dropout_takes_the_portable_path():
    inputs = inputs_of(20, torch.float32)[:3]
    torch.manual_seed(0)
    out, _ = op(*inputs, C, 1e4, dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(out, portable(*inputs, C, 1e4, dropout=0.5)[0])


@pytest.mark.parametrize("attention", [sliding_attention, portable])
def test_compiles_as_one_graph(attention):
    where, position, fill = boundaries("both", B, 20), torch.tensor([3, 29, 8]), torch.tensor([3, 13, 8])

    def loss(q, k, v, keys, values, fill, position, where):
        out, leaving = attention(q, k, v, C, 1e4, SlidingCache(keys, values, fill, position), where)
        return out.square().sum() + leaving.keys.square().sum() + leaving.values.square().sum()

    inputs = [t.requires_grad_() for t in inputs_of(20, torch.float32)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs, fill, position, where), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs, fill, position, where), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
