import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.ops import reference
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.chunk_attention import KeyValueCache
from megalodon_lm.ops.chunk_attention import chunk_attention as op
from megalodon_lm.ops.cpu import batched_attention, causal_attention, rotary, squares, tiled_attention
from megalodon_lm.ops.cpu import open_chunk as exits
from megalodon_lm.ops.cpu.chunk_attention import chunk_attention
from megalodon_lm.training.memory import resident

from ..processes import HANGS
from .cases import BOUNDARIES, assert_close, boundaries, gradients, sampled

portable = op.portable
B, H, DK, DV, C = 3, 2, 4, 6, 16
WIDTHS = [(DK, DV), (32, 64)]  # the second ones go into the matrix tiles of processors that have them
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def case(length, dtype=torch.float32, chunk_size=C, dk=DK, dv=DV, seed=0, batch=B):
    """Normal; in bf16 so that scores, and products of outputs and gradients, are as large at every width."""
    g = torch.Generator().manual_seed(seed)
    piece = [(batch, length, H, d) for d in (dk, dk, dv)]
    cache = [(batch, chunk_size, H, d) for d in (dk, dv)]
    narrow = [(DK / dk) ** 0.25, (DK / dk) ** 0.25, (DV / dv) ** 0.5, (DK / dk) ** 0.25, (DV / dv) ** 0.5]
    drawn = [torch.randn(s, generator=g, dtype=torch.float64) for s in (*piece, *cache)]
    if dtype == torch.bfloat16:
        drawn = [t * scale for t, scale in zip(drawn, narrow, strict=True)]
    return [t.to(dtype) for t in drawn]


def run(op, where, fill, chunk_size=C):
    def call(q, k, v, keys, values):
        used = (torch.arange(chunk_size) < fill[:, None])[..., None, None]
        cache = KeyValueCache(torch.where(used, keys, 0), torch.where(used, values, 0), fill)
        out, leaving = op(q, k, v, chunk_size, 1e4, cache, where)
        call.fill = leaving.fill
        return out, leaving.keys, leaving.values

    return call


def compare(where, fill, inputs, chunk_size=C, slow=reference.chunk_attention):
    fast, slow = run(chunk_attention, where, fill, chunk_size), run(slow, where, fill, chunk_size)
    actual, expected = gradients(fast, inputs), gradients(slow, [t.double() for t in inputs])
    of_piece = gradients(fast, inputs, asked=3)[1]  # a cache that is carried on as it is
    pairs = [*zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)]
    pairs += zip(of_piece, expected[1][:3], strict=True)
    for a, e in pairs:
        scale = e.abs().max().clamp(min=1)  # the gradient of the score of a lone key is 0 up to rounding
        assert ((a - e).abs().max() / scale).item() <= TOLERANCE[inputs[0].dtype]
    assert all(a.dtype == inputs[0].dtype for a in actual[0] + actual[1])
    assert torch.equal(fast.fill, slow.fill)


@pytest.fixture(autouse=True)
def by_products_of_pytorch(monkeypatch):
    """What squares compute is tested in test_squares.py."""
    monkeypatch.setattr(squares, "available", lambda dtype: None)


@pytest.mark.parametrize(
    ("kind", "fill", "length", "dtype", "few", "widths"),
    sampled(BOUNDARIES, [(0, 0, 0), (5, 5, 5), (3, 15, 0)], [1, 7, 16, 50], TOLERANCE, [0, 8], WIDTHS),
)
def test_equals_reference_with_all_gradients(kind, fill, length, dtype, few, widths, monkeypatch):
    monkeypatch.setattr(causal_attention, "MERGED_KEYS", 5)
    monkeypatch.setattr(tiled_attention, "TILE_SIZE", 5)
    monkeypatch.setattr(batched_attention, "TOGETHER", 60)
    monkeypatch.setattr(causal_attention, "FEW_QUERIES", few)
    compare(boundaries(kind, B, length), torch.tensor(fill), case(length, dtype, C, *widths))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("widths", [(18, 34), (64, 32)])
@pytest.mark.parametrize("kind", BOUNDARIES)
def test_merged_documents_and_long_chunks_equal_the_portable_path(kind, widths, dtype):
    """Default tiles: several short documents in one, long chunks, widths that fill no vector or whole ones."""
    size = 600
    fill = torch.tensor([17, 0, 599])
    compare(boundaries(kind, B, 900), fill, case(900, dtype, size, *widths), size, portable)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_short_groups_go_together(dtype, monkeypatch):
    """Four shapes in eight rows, two products forward and five backward for each, where the processor has no tiles.

    Once with gradients to the cache and once without.
    """
    fill = torch.tensor([0, 64, 7, 0, 64, 64, 120, 0])
    products, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: products.append(len(a) // H) or bmm(a, b))
    compare(None, fill, case(64, dtype, 128, 18, 34, batch=8), 128)
    assert sorted(products) == sorted([3, 3, 1, 1] * 7 * 2)


def test_without_cache():
    q, k, v, _, _ = case(40)
    out, leaving = chunk_attention(q, k, v, C, 1e4)
    expected, entry = portable(q.double(), k.double(), v.double(), C, 1e4)
    assert_close([out, *leaving[:2]], [expected, *entry[:2]], 1e-5)
    assert leaving.fill.tolist() == [8, 8, 8]


def test_short_documents_cost_no_chunk():
    """400 documents of 10 tokens and one long one: products of tiles of documents, not of whole chunks."""
    starts = torch.zeros(1, 5000, dtype=torch.bool)
    starts[0, :4000:10] = True
    starts[0, 4000] = True
    slots = Boundaries(starts).since_start(torch.zeros(1, dtype=torch.int64), 5000) % 1024
    _, groups = causal_attention._plan(slots)
    keys = groups[:, 2] - groups[:, 1] + groups[:, 3]
    assert keys.sum() == 5000
    assert len(groups) == 4000 // 250 + 1
    assert keys.max() == 1000


def test_holds_nothing_of_chunk_by_chunk():
    size = 1024
    inputs = [t.requires_grad_() for t in case(size, torch.bfloat16, size, 16, 16, batch=1)[:3]]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out, _ = chunk_attention(*inputs, size, 1e4)
    assert max(saved) <= size * H * 16
    assert sum(saved) < 6 * size * H * 16
    out.sum().backward()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_is_bitwise_repeatable(dtype):
    inputs = case(700, dtype, 512, 32, 96)
    call = run(chunk_attention, boundaries("both", B, 700), torch.tensor([3, 15, 0]), 512)
    once, again = gradients(call, inputs), gradients(call, inputs)
    for a, b in zip(once[0] + once[1], again[0] + again[1], strict=True):
        assert torch.equal(a, b)


def test_under_autocast_computes_in_bf16():
    q, k, v, _, _ = case(20)
    with torch.autocast("cpu", torch.bfloat16):
        out, leaving = op(q, k, v, C, 1e4)
    assert out.dtype == leaving.keys.dtype == leaving.values.dtype == torch.bfloat16


def test_large_scores_stay_finite():
    q, k, v, _, _ = case(40)
    out, _ = chunk_attention(1e3 * q, 1e3 * k, v, C, 1e4)
    expected, _ = portable(1e3 * q, 1e3 * k, v, C, 1e4)
    assert_close([out], [expected], 1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_multiplies_matrices(dtype):
    """The parent's OpenMP threads, which PyTorch's products would wait for, are not there in the child."""
    expected = _total(dtype)
    assert torch.get_num_threads() == 2
    (torch.ones(600, 600) @ torch.ones(600, 600)).sum()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_total, (dtype,)).get(HANGS) == pytest.approx(expected, rel=1e-2)


def _total(dtype):
    with torch.no_grad():
        out, _ = chunk_attention(*case(700, dtype, 512, 32, 96)[:3], 512, 1e4)
        return (out @ torch.ones(96, 512, dtype=dtype)).abs().mean().item()


RUNS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=8)


@settings(deadline=None)
@given(st.lists(RUNS, min_size=1, max_size=4), st.integers(0, 9))
def test_groups_computed_together_are_alike_and_share_no_keys(rows, entries):
    """Else threads would add gradients to one key at once. What is seen begins later from run to run."""
    tokens = []
    for row in rows:
        at, first, slots = 0, -entries, []
        for length, later in row:
            slots.append(at - first + torch.arange(length))
            at += length
            first = min(first + later, at)
        tokens.append(torch.cat(slots))
    slots = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_attention, "MERGED_KEYS", 5)
        _, groups = causal_attention._plan(slots, torch.empty(len(rows), entries, H, DK))
    batches = [batch.tolist() for batch in batched_attention._alike(groups, H)]
    assert sorted(group for batch in batches for group in batch) == groups.tolist()
    for batch in batches:
        assert len({(end - begin, before) for _, begin, end, before, _ in batch}) == 1
        keys = [(row, key) for row, begin, end, before, _ in batch for key in range(begin - before, end)]
        assert len(keys) == len(set(keys))


def test_dropout_takes_the_portable_path():
    inputs = case(20)[:3]
    torch.manual_seed(0)
    out, _ = op(*inputs, C, 1e4, dropout=0.5)
    torch.manual_seed(0)
    expected, _ = portable(*inputs, C, 1e4, dropout=0.5)
    assert torch.equal(out, expected)


def test_operators_are_well_formed():
    q, k, v, keys, values = (t.requires_grad_() for t in case(20))
    slots = (torch.tensor([[5], [0], [3]]) + torch.arange(20)) % C
    slots[2, 15:] = -1
    places = torch.tensor([[20, 9, 5], [20, 4, 0], [15, 2, 3]])
    torch.library.opcheck(rotary.rotate_pairs, (q, slots, 1e4, C, H, False))
    torch.library.opcheck(causal_attention.attention_forward, (q, k, v, keys, values, slots))
    torch.library.opcheck(causal_attention.attention_forward, (q, k, v, None, None, torch.arange(20).expand(B, 20) % C))
    torch.library.opcheck(exits.take_open_chunk, (k, keys, places, C))


@pytest.mark.parametrize("kind", ["none", "both"])
def test_compiles_as_one_graph(kind):
    where, fill = boundaries(kind, B, 20), torch.tensor([3, 15, 0])

    def loss(q, k, v, keys, values, fill, where):
        out, leaving = chunk_attention(q, k, v, C, 1e4, KeyValueCache(keys, values, fill), where)
        return out.square().sum() + leaving.keys.square().sum() + leaving.values.square().sum()

    inputs = [t.requires_grad_() for t in case(20)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs, fill, where), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs, fill, where), inputs), expected, strict=True):
        assert torch.equal(a, b)


SHORT_PIECE = """
import torch
from megalodon_lm.ops.cpu.open_chunk import open_chunk
from megalodon_lm.training.memory import resident

for dtype in (torch.float32, torch.bfloat16):
    piece, places = torch.randn(1, 16, 1, 64).to(dtype), torch.tensor([[16, 12, 0]])
    open_chunk(piece, None, places, 16)  # loads the kernel
    before, size = resident(), 2**28 // 64 // dtype.itemsize
    cache = open_chunk(piece, None, places, size)
    print(resident() - before)
    assert (cache.dtype, cache.shape) == (dtype, (1, size, 1, 64))
    assert torch.equal(cache[:, :12], piece[:, 4:]) and not cache[:, 12:].any()
"""


@pytest.mark.skipif(resident() is None, reason="the system does not tell what a process holds")
def test_a_cache_takes_memory_for_what_it_holds():
    """256 MB of a long window, of which a short piece fills the beginning; in a process whose memory is not filled."""
    told = subprocess.run([sys.executable, "-c", SHORT_PIECE], capture_output=True, text=True, check=True)
    assert max(map(int, told.stdout.split())) < 2**25


def test_a_batch_of_no_rows_goes_on_from_a_cache():
    q = torch.zeros(0, 4, 2, 8)
    cache = KeyValueCache(torch.zeros(0, 8, 2, 8), torch.zeros(0, 8, 2, 8), torch.zeros(0, dtype=torch.int64))
    out, leaving = chunk_attention(q, q, q, 8, 1e4, cache)
    assert (out.shape, leaving.keys.shape, leaving.fill.shape) == (q.shape, cache.keys.shape, cache.fill.shape)


@pytest.mark.parametrize("fill", [0, 3, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exit_cache_is_zero_beyond_what_it_holds(fill, dtype):
    """In pages that nobody touched, where little is held, and in kept memory with what was there before."""
    piece = torch.randn(2, 70, 4, 16).to(dtype)
    for _ in range(3):
        cache = exits.open_chunk(piece, None, torch.tensor([[70, fill, 0], [60, 0, 0]]), 64)
        expected = torch.zeros(2, 64, 4, 16, dtype=dtype)
        expected[0, :fill] = piece[0, 70 - fill :]
        assert torch.equal(cache, expected)
        cache.fill_(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_an_exit_cache_of_its_own():
    cache = exits.open_chunk(torch.randn(1, 64, 4, 16), None, torch.tensor([[64, 0, 0]]), 64)
    child = os.fork()
    if not child:
        cache.numpy().fill(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not cache.any()
