"""Muon for the matrices of a model, AdamW for everything else, as one optimiser."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..parallel.ranks import held_as, whole

# Polynomials a x + b x^3 + c x^5, each the one that comes nearest to 1 on what those before it make of [0.01, 1]
# (minimax, by linear programming; after Amsel et al. 2025, arXiv 2505.16932). Five of them taught no better than three.
_STEPS = (
    (8.093369, -23.620432, 17.446153),
    (3.636586, -2.721927, 0.536546),
    (2.661300, -1.977155, 0.452616),
)
_MARGIN = 1.01  # of the norm, so that rounding leaves no singular value above 1


TOGETHER = 1 << 20  # elements of matrices that are orthogonalised together, unless one has more


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T of singular value decompositions U S V^T: S from 0.01 of its norm up ends in 0.73 to 1.27.

    Args:
        matrices: (K, M, N).
        dtype: of the products.

    Returns:
        (K, M, N) float32.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) * _MARGIN + torch.finfo(torch.float32).tiny)
    for a, b, c in _STEPS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def _alike(weights: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Those of one shape together: small products take longer to start than to do."""
    shapes = defaultdict(list)
    for weight in weights:
        shapes[weight.shape].append(weight)
    for shape, alike in shapes.items():
        most = max(1, TOGETHER // max(1, shape.numel()))
        for i in range(0, len(alike), most):
            yield alike[i : i + most]


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `matrices = True` move along the orthogonalised momentum of their gradients instead.

    A matrix (fan_out, fan_in) takes a step of size lr * sqrt(max(1, fan_out / fan_in)) in every direction at once
    (Jordan et al. 2024, Muon; momentum as Nesterov's). Its decay is decoupled, as in AdamW.
    A matrix of which ranks hold shares is gathered, and every rank orthogonalises the whole of it.

    Args:
        groups: of parameters, each with its lr and weight_decay; those of matrices with `momentum`.
        dtype: of the products that orthogonalise.
        adamw: further choices of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **adamw: Any):
        super().__init__(groups, **adamw)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; the gradients of matrices are used up.

        Args:
            closure: computes the loss and the gradients anew, once.

        Returns:
            What it returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group.get("matrices"):
                for weights in _alike(weight for weight in group["params"] if weight.grad is not None):
                    self._move(weights, group)
        super().step()
        return loss

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Those of one shape; their gradients are gone then, so that AdamW passes them over."""
        directions = orthogonalized(torch.stack([self._direction(w, group) for w in weights]), self._dtype)
        for weight, direction in zip(weights, directions, strict=True):
            size = group["lr"] * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(held_as(direction, weight), alpha=-size)
            weight.grad = None

    def _direction(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """The whole of what is orthogonalised: the gradient on the way to its momentum."""
        gradient, state = weight.grad, self.state[weight]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        return whole(gradient.lerp(momentum, group["momentum"]))
