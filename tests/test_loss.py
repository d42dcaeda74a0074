"""The loss that the model gives against that of its logits."""

import pytest
import torch
import torch.nn.functional as F

from megalodon_lm.errors import InputError
from megalodon_lm.state_spec import Sealed

from .test_cut_invariant import build


@pytest.fixture(scope="module")
def piece():
    """A piece in the middle of two rows, packed and padded, some of it learnt; and a model with its state there."""
    model, drawing = build(), torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, 30, (2, 2, 21), generator=drawing)
    starts, mask, learnt = (torch.rand(2, 21, generator=drawing) < share for share in (0.1, 0.8, 0.6))
    return model, model(tokens[:, :5])[1].detach(), tokens, targets, {"document_starts": starts, "mask": mask}, learnt


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_and_gradients_are_those_of_the_logits(piece, reduction, padded):
    model, state, tokens, targets, options, learnt = piece
    counts = learnt & options["mask"] if padded else learnt
    options = options if padded else {}
    logits, after = model(tokens, state, **options)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    expected = losses[counts].mean() if reduction == "mean" else torch.where(counts, losses, 0)
    actual, same = model(tokens, state, targets=targets, learnt=learnt, reduction=reduction, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    for a, b in zip(same.tensors().values(), after.tensors().values(), strict=True):
        assert torch.equal(a, b)
    weights = list(model.parameters())
    for a, e in zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def test_padding_alone_keeps_targets_out_of_the_loss(piece):
    model, state, tokens, targets, options, _ = piece
    each, _ = model(tokens, state, targets=targets, reduction="none", **options)
    mean, _ = model(tokens, state, targets=targets, **options)
    assert not each[~options["mask"]].any()
    torch.testing.assert_close(mean, each.sum() / options["mask"].sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_logits_of_the_last_tokens_alone(piece, count):
    model, state, tokens, *_ = piece
    logits, after = model(tokens, state)
    kept, same = model(tokens, state, logits_to_keep=count)
    torch.testing.assert_close(kept, logits[:, max(0, 21 - count) :], rtol=1e-12, atol=1e-12)
    for a, b in zip(same.tensors().values(), after.tensors().values(), strict=True):
        assert torch.equal(a, b)


def test_the_parts_run_apart_are_the_model(piece):
    model, state, tokens, *_ = piece
    x, layers = model.body(model.embed(tokens), state.parts["layers"])
    logits, norm = model.output(x, Sealed(state.parts["norm"]))
    expected, after = model(tokens, state)
    assert torch.equal(logits, expected)
    assert torch.equal(norm.mean, after.parts["norm"].mean)
    assert torch.equal(layers[-1]["cema"], after.parts["layers"][-1]["cema"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": torch.zeros(1, 3, dtype=torch.int64)}, r"targets must have the shape \(1, 2\)"),
        ({"targets": torch.full((1, 2), -100)}, "token -100 is outside the vocabulary of 259"),
        ({"targets": torch.zeros(1, 2, dtype=torch.int64), "reduction": "sum"}, "reduction = 'sum' must be one of"),
        ({"targets": torch.zeros(1, 2, dtype=torch.int64), "learnt": torch.ones(1, 2)}, "learnt must be bool"),
    ],
)
def test_wrong_targets_are_refused(tiny, options, message):
    with pytest.raises(InputError, match=message):
        tiny(torch.zeros(1, 2, dtype=torch.int64), **options)
