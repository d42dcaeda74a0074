"""The loss against PyTorch's own of all logits, which is its definition."""

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm.ops import linear_cross_entropy as module
from megalodon_lm.ops.linear_cross_entropy import linear_cross_entropy


@pytest.fixture(params=[1 << 24, 37])
def chunk_logits(request, monkeypatch):
    """All rows at once, or three at a time."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", request.param)


def drawn(dtype=torch.float64, shape=(2, 5)):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*s, 8, dtype=dtype, requires_grad=True) for s in (shape, (11,)))
    return hidden, weight, torch.randint(0, 11, shape), torch.rand(shape) < 0.6


def defined(hidden, weight, targets, learnt, reduction):
    losses = F.cross_entropy((hidden @ weight.T).flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
    return losses[learnt].mean() if reduction == "mean" else losses * learnt


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("some", [False, True])
def test_losses_and_gradients_are_those_of_all_logits(chunk_logits, reduction, some):
    hidden, weight, targets, learnt = drawn()
    actual = linear_cross_entropy(hidden, weight, targets, learnt if some else None, reduction)
    expected = defined(hidden, weight, targets, learnt if some else torch.ones_like(learnt), reduction)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(hidden, weight, targets, learnt if some else None, reduction), actual, rtol=0, atol=0
        )
    upstream = torch.randn_like(actual)
    for a, e in zip(*(torch.autograd.grad(y, (hidden, weight), upstream) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_those_of_differences(chunk_logits, reduction):
    hidden, weight, targets, learnt = drawn()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, learnt, reduction), (hidden, weight)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_autocast_products_alone_are_rounded(reduction):
    hidden, weight, targets, learnt = drawn(torch.float32, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        actual = linear_cross_entropy(hidden, weight, targets, learnt, reduction)
        with torch.no_grad():
            unrecorded = linear_cross_entropy(hidden, weight, targets, learnt, reduction)
    expected = defined(hidden, weight, targets, learnt, reduction)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(unrecorded, actual, rtol=0, atol=0)
    grads = torch.autograd.grad(actual.sum(), (hidden, weight))
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]


def test_where_nothing_is_learnt_the_loss_is_zero_and_moves_nothing():
    hidden, weight, targets, _ = drawn()
    nothing = torch.zeros_like(targets, dtype=torch.bool)
    for reduction, shape in (("mean", ()), ("none", (2, 5))):
        loss = linear_cross_entropy(hidden, weight, targets, nothing, reduction)
        assert torch.equal(loss, torch.zeros(shape, dtype=torch.float64))
        assert not any(g.any() for g in torch.autograd.grad(loss.sum(), (hidden, weight)))
