"""Products of reading against the definition in float64, with the same roundings."""

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm.layers import linear as reading
from megalodon_lm.layers.initialization import init_he
from megalodon_lm.layers.linear import Linear
from megalodon_lm.ops.cpu import linear as native
from megalodon_lm.ops.cpu import squares, squares_linear
from megalodon_lm.ops.linear import linear, linear_add, linear_gate, linear_silu, linears

from .test_squares import KINDS, TILES, only


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (2, 70, 40), (0, 40), (2, 0, 40)])
def test_it_is_the_product_of_what_was_rounded(shape, with_bias, dtype):
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=g) for s in (shape, (24, 40), (24,)))
    bias = bias if with_bias else None
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        found = linear(x, weight, bias)
        again = linear(x, weight, bias)
    wide = [None if t is None else t.to(dtype).double() for t in (x, weight, bias)]
    expected = F.linear(*wide)
    assert found.dtype == dtype
    assert torch.equal(found, again)
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-2)


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def onednn(request, monkeypatch):
    """Whether oneDNN's products are taken in float32, however few they are."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch has no oneDNN here")
    monkeypatch.setattr(native, "MANY", 0)
    monkeypatch.setattr(native, "_onednn_multiplies_float32_faster", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("fan_out", [1, 24, 37, 64])
@pytest.mark.parametrize("shape", [(1, 40), (2, 70, 40), (2, 33, 32), (1, 1, 23), (3, 5, 1), (0, 40), (2, 0, 40)])
def test_the_product_in_one_type(shape, fan_out, with_bias, dtype, onednn):
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=g, dtype=dtype) for s in (shape, (fan_out, shape[-1]), (fan_out,)))
    bias = bias if with_bias else None
    expected = F.linear(*(None if t is None else t.double() for t in (x, weight, bias)))
    strided = [t.mT.contiguous().mT for t in (x, weight)]
    with torch.inference_mode():
        for given in ((x, weight), (strided[0], weight), (x, strided[1])):
            found = linear(*given, bias)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=200 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("narrow", [True, False])
def test_what_is_not_finite_stays_in_its_token(narrow, onednn):
    x, weight = torch.randn(3, 33, 40), torch.randn(24, 40)
    x[1, 5, 3] = torch.nan
    with torch.inference_mode():
        bias = torch.zeros(24)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            found = linear(x, weight, bias)
    spoilt = torch.zeros(3, 33, dtype=torch.bool)
    spoilt[1, 5] = True
    assert torch.equal(found.isnan(), spoilt[..., None].expand_as(found))


@pytest.fixture(params=[*KINDS, None])
def in_squares(request, monkeypatch):
    """Squares of each kind; and oneDNN's products of bf16 with kernels after them."""
    monkeypatch.setattr(squares, "available", only(*KINDS.get(request.param, (None, None))))
    return request.param is not None


@pytest.fixture
def dtype(request, in_squares):
    return KINDS[request.node.callspec.params["in_squares"]][1] if in_squares else torch.bfloat16


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("panel_bytes", [1 << 20, 1 << 13])
@pytest.mark.parametrize("rows", [(1,), (2, 37), (96,)])
@pytest.mark.parametrize("wide_residual", [True, False])
def test_layers_with_what_follows_them(rows, panel_bytes, with_bias, wide_residual, dtype, in_squares, monkeypatch):
    """Against the definition, for strips that end early and several panels.

    A row does not depend on those beside it, and NaN stays in its row.
    """
    residual_dtype = torch.float32 if wide_residual else dtype
    monkeypatch.setattr(squares_linear, "PANEL_BYTES", panel_bytes)
    g = torch.Generator().manual_seed(0)
    widths = (160, 96, 160)
    x, residual, other = (torch.randn(*rows, n, generator=g) for n in (96, 160, 160))
    layers = [
        (torch.randn(n, 96, generator=g) / 10, torch.randn(n, generator=g) if with_bias else None) for n in widths
    ]
    x, residual, other = x.to(dtype), residual.to(residual_dtype), other.to(dtype)
    assert squares_linear.fits(x, layers[0][0]) is False  # gradients are on

    def compute(x, residual, other):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert squares_linear.fits(x, layers[0][0]) == in_squares
            assert not any(squares_linear.fits(x, w) for w in (layers[0][0][:40], layers[0][0][:, :80]))
            return [
                *linears(x, tuple(layers)),
                linear(x, *layers[0]),
                linear_silu(x, layers[1]),
                linear_gate(x, layers[0], layers[2]),
                linear_add(x, layers[0], residual),
                linear_add(x, layers[2], residual, other),
            ]

    def define(x, residual, other):
        made = [F.linear(x, w.to(dtype).double(), None if b is None else b.to(dtype).double()) for w, b in layers]
        gated = F.silu(made[0]) * made[2]
        return [*made, made[0], F.silu(made[1]), gated, residual + made[0], residual + made[2] + other]

    given = x, residual, other
    found, expected = compute(*given), define(*(t.double() for t in given))
    for i, (a, e) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == (residual_dtype if i > 5 else dtype)
        near = dict(rtol=2**-6, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.double(), e, **near)
    alone = compute(*(t.flatten(0, -2)[:1] for t in given))
    spoilt = compute(x.masked_fill(torch.arange(x.numel()).view_as(x) == 5, torch.nan), residual, other)
    for a, one, bad in zip(found, alone, spoilt, strict=True):
        a, bad = a.flatten(0, -2), bad.flatten(0, -2)
        if in_squares:
            assert torch.equal(a[:1], one)
        assert bad[0].isnan().all()
        assert torch.equal(bad[1:], a[1:])


@pytest.mark.parametrize("tiles", TILES)
def test_sums_are_rounded_once(tiles, monkeypatch):
    """What follows a layer sees its sums in float32: a branch of 2^-9 of the sum is not lost."""
    monkeypatch.setattr(squares, "available", only(TILES[tiles], torch.bfloat16))
    x, weight = torch.ones(32, 32).bfloat16(), torch.full((32, 32), 1 / 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = linear_add(x, (weight, None), torch.zeros(32, 32), torch.full((32, 32), 2**-9, dtype=torch.bfloat16))
    assert torch.equal(found, torch.full((32, 32), 1 + 2**-9))


def test_layers_go_their_own_way_where_somebody_listens():
    """A hook sees its layer's result, and an adapter in a layer's place runs."""
    layer, other = (Linear(32, 32, True, init_he) for _ in range(2))
    for module in (layer, other):
        module.init_weights()
    x, seen = torch.randn(3, 32), []
    with torch.inference_mode():
        expected = F.silu(layer(x)), layer(x) + 1, F.silu(layer(x)) * other(x)
        other.register_forward_hook(lambda *_: seen.append(1))
        layer.register_forward_hook(lambda *_: seen.append(1))
        adapter = torch.nn.Sequential(layer)
        for used in (layer, adapter):
            seen.clear()
            together = reading.linears(x, used, other)
            found = reading.linear_silu(x, used), reading.linear_add(x, used, torch.ones(3, 32))
            gated = reading.linear_gate(x, used, other)
            assert len(seen) == 6
            torch.testing.assert_close((*found, gated), expected)
            torch.testing.assert_close(together, (layer(x), other(x)))


@pytest.mark.parametrize("grad", [True, False])
def test_types_that_do_not_match_are_refused_with_gradients_or_without(grad):
    layer = Linear(32, 32, False, None).bfloat16()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.ones(3, 32))
