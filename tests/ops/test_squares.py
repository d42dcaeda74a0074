"""Attention in squares: of bf16 with emulated tiles everywhere and with what the processor has, and of float32."""

import numpy as np
import pytest
import torch
from numba import njit

from megalodon_lm.ops import reference
from megalodon_lm.ops.chunk_attention import chunk_attention as portable
from megalodon_lm.ops.cpu import causal_attention, squares, vector_squares
from megalodon_lm.ops.cpu.chunk_attention import chunk_attention
from megalodon_lm.ops.cpu.emulated_tiles import EMULATED
from megalodon_lm.ops.cpu.processor import has_bf16_vectors, multiplies_tiles
from megalodon_lm.ops.cpu.simd import as_numpy, compiled
from megalodon_lm.ops.cpu.squares import (
    add_product,
    enter_tiles,
    leave_tiles,
    load_sums,
    multiply,
    store_sums,
    sums_at_hand,
)
from megalodon_lm.ops.cpu.squares_packing import pack, pack_transposed, square_words
from megalodon_lm.ops.cpu.vector_squares import VECTORS

from . import test_cpu_sliding_attention as sliding
from . import test_local_attention as local
from .cases import BOUNDARIES, boundaries, gradients
from .test_cpu_chunk_attention import B, H, case, compare, run
from .test_not_finite import run_attention
from .test_not_finite import spoilt as spoil

TILES = {"emulated": EMULATED}
TILES |= {"amx": squares.AMX} if multiplies_tiles() else {}
TILES |= {"vectors": VECTORS} if has_bf16_vectors() else {}
KINDS = {name: (tiles, torch.bfloat16) for name, tiles in TILES.items()} | {"float32": (VECTORS, torch.float32)}


@pytest.fixture(params=KINDS)
def kind_of_squares(request, monkeypatch):
    tiles, dtype = KINDS[request.param]
    use(tiles, dtype, monkeypatch)
    return tiles, dtype


@pytest.fixture
def dtype(kind_of_squares):
    return kind_of_squares[1]


def only(tiles, dtype):
    """In place of squares.available."""
    return lambda wanted: tiles if wanted == dtype else None


def use(tiles, dtype, monkeypatch):
    monkeypatch.setattr(squares, "available", only(tiles, dtype))
    monkeypatch.setattr(causal_attention, "FEW_QUERIES", 0)


@compiled
def product(tiles, a, packed, step, squares, c):
    """c[:32] += the product of a (32, 32 squares) with packed squares, and c[32:64] = it."""
    own = enter_tiles(tiles)
    load_sums(own, c, 0, 32)
    add_product(own, a, 0, 32 * squares, packed, 0, step, squares)
    store_sums(own, c, 0, 32)
    multiply(own, a, 0, 32 * squares, packed, 0, step, squares)
    sums = sums_at_hand(own, c[2 * 32 * 32 :])
    for i in range(32 * 32):
        c[32 * 32 + i] = sums[i]
    leave_tiles(own)


@compiled
def pack_rows(rows, width, squares, packed):
    for i in range(squares):
        pack(rows, i * 32 * width, width, width, packed, i * square_words(rows), squares * square_words(rows))


@compiled
def pack_columns(rows, width, packed):
    pack_transposed(rows, width, packed, 0, square_words(rows))


def packed_squares(b, transposed):
    """Of a matrix 32 columns wide, packed as it is or as the transpose of its transpose."""
    packed = np.empty(b.numel() * b.itemsize // 4, np.uint32)
    if transposed:
        pack_columns(as_numpy(b.T.contiguous()).reshape(-1), len(b), packed)
    else:
        pack_rows(as_numpy(b).reshape(-1), 32, len(b) // 32, packed)
    return packed


@pytest.mark.parametrize("transposed", [False, True])
def test_product_of_tiles_is_a_matrix_product(kind_of_squares, transposed):
    tiles, dtype = kind_of_squares
    g = torch.Generator().manual_seed(0)
    squares = 3
    a, b = (torch.randn(s, generator=g).to(dtype) for s in ((32, 32 * squares), (32 * squares, 32)))
    c = torch.randn(96, 32, generator=g)
    expected = a.double() @ b.double()
    expected = torch.cat([c[:32].double() + expected, expected])
    packed = packed_squares(b, transposed)
    product(tiles, as_numpy(a).reshape(-1), packed, len(packed) // squares, squares, as_numpy(c).reshape(-1))
    torch.testing.assert_close(c[:64].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wide", [True, False])
def test_blocks_of_rows_of_either_width_of_registers(wide, monkeypatch):
    """As for AVX-512 and for AVX2, whatever this processor has: the rows that matter, of squares that lie apart."""
    monkeypatch.setattr(vector_squares, "has_wide_vectors", lambda: wide)
    start, add = squares._set_product, squares._add_product

    @njit  # one that nobody keeps: `multiply` is made once for a process
    def products(sums, a, packed, count, rows):
        start(sums, a, 0, 32 * 3, packed, 0, 2048, count, rows)
        add(sums, a, 64, 32 * 3, packed, 1024, 2048, 1, rows)

    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(32, 96, generator=g), torch.randn(4 * 32, 32, generator=g)
    packed = packed_squares(b, False)
    whole = a[:, :32].double() @ b[:32].double(), a[:, 32:64].double() @ b[64:96].double()
    last = a[:, 64:].double() @ b[32:64].double()
    for rows in range(1, 33):
        for count in range(3):
            sums = torch.full((33, 32), 7.0)
            products(as_numpy(sums).reshape(-1)[:1024], as_numpy(a).reshape(-1), packed, count, rows)
            expected = sum(whole[:count], last)
            torch.testing.assert_close(sums[:rows].double(), expected[:rows], rtol=1e-5, atol=1e-5)
            assert torch.equal(sums[32], torch.full((32,), 7.0))


SAMPLE = [("none", 7, 16, (5, 5, 5)), ("both", 50, 40, (3, 39, 0)), ("documents", 40, 90, (0, 0, 0))]
GRID = [
    (kind, length, chunk_size, fill)
    for kind in BOUNDARIES
    for length in (1, 33, 70)
    for chunk_size, fill in ((16, (5, 5, 5)), (40, (3, 39, 0)), (90, (0, 0, 0)))
]


@pytest.mark.parametrize(
    ("kind", "length", "chunk_size", "fill"), SAMPLE + [pytest.param(*c, marks=pytest.mark.slow) for c in GRID]
)
def test_equals_reference_with_all_gradients(dtype, kind, length, chunk_size, fill, monkeypatch):
    monkeypatch.setattr(causal_attention, "MERGED_KEYS", 36)
    inputs = case(length, dtype, chunk_size, 32, 64)
    compare(boundaries(kind, B, length), torch.tensor(fill), inputs, chunk_size)


@pytest.mark.parametrize("kind", ["none", "both"])
def test_long_chunks_equal_the_portable_path(dtype, kind):
    """Several tiles of keys, queries that come after more than one of them, and queries wider than values."""
    fill, size = torch.tensor([17, 300, 599]), 600
    compare(boundaries(kind, B, 350), fill, case(350, dtype, size, 64, 32), size, portable)


SLIDING_SAMPLE = [("none", 50, 8, (5, 5, 5)), ("both", 70, 20, (3, 59, 0)), ("documents", 50, 40, (39, 40, 81))]
SLIDING_GRID = [
    (kind, length, chunk_size, position)
    for kind in BOUNDARIES
    for length in (1, 33, 70)
    for chunk_size, position in ((8, (5, 5, 5)), (20, (3, 59, 0)), (40, (39, 40, 81)))
]


@pytest.mark.parametrize(
    ("kind", "length", "chunk_size", "position"),
    SLIDING_SAMPLE + [pytest.param(*c, marks=pytest.mark.slow) for c in SLIDING_GRID],
)
def test_sliding_attention_equals_reference_with_all_gradients(dtype, kind, length, chunk_size, position, monkeypatch):
    monkeypatch.setattr(causal_attention, "MERGED_KEYS", 36)
    inputs = sliding.inputs_of(length, dtype, 32, 64, chunk_size)
    sliding.compare(boundaries(kind, B, length), position, inputs, chunk_size)


def test_chunks_of_several_tiles_of_keys_and_the_ones_before(dtype):
    inputs = sliding.inputs_of(700, dtype, 64, 32, 300)
    sliding.compare(boundaries("both", B, 700), (17, 899, 0), inputs, 300, sliding.portable)


@pytest.mark.skipif(not multiplies_tiles(), reason="the processor has no tiles to compare with")
def test_processor_and_emulation_agree(monkeypatch):
    found = []
    for tiles in (EMULATED, squares.AMX):
        use(tiles, torch.bfloat16, monkeypatch)
        call = run(chunk_attention, boundaries("both", B, 350), torch.tensor([17, 300, 599]), 600)
        outputs, grads = gradients(call, case(350, torch.bfloat16, 600, 64, 32))
        found.append(outputs + grads)
    for a, b in zip(*found, strict=True):  # they may add in another order: the last bit of bf16, seldom
        torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-4)
        assert (a != b).double().mean() < 0.02


@pytest.mark.parametrize("widths", [(18, 34), (32, 40), (40, 32)])
@pytest.mark.parametrize("cached", [True, False])
def test_heads_that_fill_no_square(dtype, widths, cached, monkeypatch):
    monkeypatch.setattr(causal_attention, "MERGED_KEYS", 36)
    fill = torch.tensor([3, 39, 0] if cached else [0, 0, 0])
    compare(boundaries("both", B, 50), fill, case(50, dtype, 40, *widths), 40)
    pieces = case(50, dtype, 40, *widths)[:3]
    found, expected = (
        gradients(lambda *a, of=of: of(*a, 40, 1e4)[:1], [t.to(dtype) for t in pieces])
        for of, dtype in ((chunk_attention, dtype), (reference.chunk_attention, torch.float64))
    )
    for a, e in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert ((a - e).abs().max() / e.abs().max().clamp(min=1)).item() <= 3e-2


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("widths", [(32, 64), (16, 24)])
def test_nan_and_infinity_reach_what_depends_on_them(dtype, kind, widths):
    """Also where PyTorch's own products read beyond rows that fill no tile, into the next one."""
    b, length, size = 2, 18, 8
    g = torch.Generator().manual_seed(0)
    dk, dv = widths
    shapes = [(b, length, H, dk), (b, length, H, dk), (b, length, H, dv), (b, size, H, dk), (b, size, H, dv)]
    inputs = [torch.randn(s, generator=g) * 0.5 for s in shapes]
    where = boundaries(kind, b, length)
    for seed in range(2 * len(inputs)):
        given = [t.to(dtype) for t in spoil(inputs, seed)]
        with torch.no_grad():
            found = run_attention(chunk_attention)(where, *given)
            expected = run_attention(reference.chunk_attention)(where, *(t.double() for t in given))
        for i, (a, e) in enumerate(zip(found, expected, strict=True)):
            wrong = torch.isfinite(a) != torch.isfinite(e)
            assert not wrong.any(), (seed, i, wrong.nonzero()[:5], a[wrong][:5], e[wrong][:5])


@pytest.mark.parametrize(
    ("kind", "length", "window", "position"), [("none", 50, 16, (5, 5, 5)), ("both", 70, 40, (3, 59, 0))]
)
def test_windows_that_slide_equal_reference_with_all_gradients(dtype, kind, length, window, position, monkeypatch):
    monkeypatch.setattr(causal_attention, "MERGED_KEYS", 36)
    inputs = local.case(length, dtype, 32, window)
    local.compare(local.native, boundaries(kind, B, length), position, inputs, window)
