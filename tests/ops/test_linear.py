"""Products of reading against the definition in float64, with the same roundings."""

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm.ops import linear as module
from megalodon_lm.ops.linear import linear, rounded_linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (2, 70, 40), (0, 40), (2, 0, 40)])
def test_it_is_the_product_of_what_was_rounded(shape, with_bias, dtype):
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=g) for s in (shape, (24, 40), (24,)))
    bias = bias if with_bias else None
    with torch.inference_mode():
        found = rounded_linear(x, weight, bias, dtype)
        again = rounded_linear(x, weight, bias, dtype)
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
    monkeypatch.setattr(module, "MANY", 0)
    monkeypatch.setattr(module, "_onednn_multiplies_float32_faster", lambda: request.param)
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
        found = rounded_linear(x, weight, bias, torch.bfloat16) if narrow else linear(x, weight, bias)
    spoilt = torch.zeros(3, 33, dtype=torch.bool)
    spoilt[1, 5] = True
    assert torch.equal(found.isnan(), spoilt[..., None].expand_as(found))
