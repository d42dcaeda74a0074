"""Inputs for the ops' tests: random pieces with every kind of boundary."""

from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from megalodon_lm.ops.boundaries import Boundaries

BOUNDARIES = ["none", "documents", "padding", "both"]


def sampled(*axes: Iterable[Any]) -> list[Any]:
    """The cases of a grid, of which some hold every pair of values, and the others are marked slow."""
    pairs = {case: set(combinations(enumerate(case), 2)) for case in product(*axes)}
    left, found = set.union(*pairs.values()), []
    while left:
        case = max(pairs, key=lambda case: len(pairs[case] & left))
        left -= pairs.pop(case)
        found.append(pytest.param(*case))
    return found + [pytest.param(*case, marks=pytest.mark.slow) for case in pairs]


def boundaries(kind: str, batch: int, length: int, seed: int = 0) -> Boundaries | None:
    """Random document starts, row lengths (one of them 0), or both."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, length, generator=generator) < 4 / length
    starts[0, 0] = True
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths[-1] = 0
    lengths[0] = length
    return {
        "none": None,
        "documents": Boundaries(starts, None),
        "padding": Boundaries(None, lengths),
        "both": Boundaries(starts, lengths),
    }[kind]


def gradients(
    run: Callable[..., Iterable[Tensor]], inputs: list[Tensor], seed: int = 0, asked: int | None = None
) -> tuple[list[Tensor], ...]:
    """Outputs of run(*inputs), and the gradients of a random projection of all of them with respect to all inputs.

    With `asked`, to so many of the inputs alone.
    """
    kinds = [t.is_floating_point() or t.is_complex() for t in inputs[:asked]]
    inputs = [t.detach().clone().requires_grad_(any(kinds[i : i + 1])) for i, t in enumerate(inputs)]
    outputs = [t for t in run(*inputs) if t.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
    loss = sum((t.double() * w).sum() for t, w in zip(outputs, weights, strict=True))
    inputs = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]
    return [t.detach() for t in outputs], found


def assert_close(actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> None:
    """Largest difference over the largest magnitude, tensor by tensor."""
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, (index, a.shape, e.shape)
        if e.numel() == 0:
            continue
        error = (a.to(e.dtype) - e).abs().max() / e.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"tensor {index}: relative error {error:.2e} above {tolerance:.0e}"
