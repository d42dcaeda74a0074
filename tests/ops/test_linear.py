"""Products of reading against the definition in float64, with the same roundings."""

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm.layers.linear import Linear
from megalodon_lm.ops.cpu import linear as native
from megalodon_lm.ops.cpu import squares, squares_linear
from megalodon_lm.ops.linear import linear

from .test_squares import TILES


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
@pytest.mark.parametrize("fan_out", [1, 24, 37])
@pytest.mark.parametrize("shape", [(1, 40), (2, 70, 40), (1, 1, 23), (3, 5, 1), (0, 40), (2, 0, 40)])
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


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("panel_bytes", [1 << 20, 1 << 13])
@pytest.mark.parametrize("rows", [(1,), (2, 37), (96,)])
def test_products_in_tiles(rows, panel_bytes, with_bias, tiles, monkeypatch):
    """Strips that end early, several panels, and NaN that stays in its row; rows do not depend on those beside them."""
    monkeypatch.setattr(squares, "available", lambda: TILES[tiles])
    monkeypatch.setattr(squares_linear, "DEEP", 64)
    monkeypatch.setattr(squares_linear, "PANEL_BYTES", panel_bytes)
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=g) for s in ((*rows, 96), (160, 96), (160,)))
    bias, x = bias if with_bias else None, x.bfloat16()
    assert squares_linear.fits(weight)
    assert not any(map(squares_linear.fits, (weight[:40], weight[:, :80], weight[:, :32])))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found, first = linear(x, weight, bias), linear(x.view(-1, 96)[:1], weight, bias)
        spoilt = linear(x.masked_fill(torch.arange(x.numel()).view_as(x) == 5, torch.nan), weight, bias)
    expected = F.linear(x.double(), weight.bfloat16().double(), None if bias is None else bias.bfloat16().double())
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-2)
    found, spoilt = found.view(-1, 160), spoilt.view(-1, 160)
    assert torch.equal(found[:1], first)
    assert spoilt[0].isnan().all()
    assert torch.equal(spoilt[1:], found[1:])


@pytest.mark.parametrize("grad", [True, False])
def test_types_that_do_not_match_are_refused_with_gradients_or_without(grad):
    layer = Linear(32, 32, False, None).bfloat16()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.ones(3, 32))
