"""Products with rounded weights against the definition in float64, with the same roundings."""

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm.ops.linear import rounded_linear


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


def test_what_is_not_finite_stays_in_its_token():
    x, weight = torch.randn(3, 33, 40), torch.randn(24, 40)
    x[1, 5, 3] = torch.nan
    with torch.inference_mode():
        found = rounded_linear(x, weight, torch.zeros(24), torch.bfloat16)
    spoilt = torch.zeros(3, 33, dtype=torch.bool)
    spoilt[1, 5] = True
    assert torch.equal(found.isnan(), spoilt[..., None].expand_as(found))
