"""Muon for the matrices of a model, AdamW for everything else, as one optimiser."""

from collections.abc import Callable
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


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T: S from 0.01 of its norm up ends in 0.73 to 1.27.

    Args:
        matrix: (M, N).
        dtype: of the products.

    Returns:
        (M, N) float32.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    x = x / (x.norm() * _MARGIN + torch.finfo(torch.float32).tiny)
    for a, b, c in _STEPS:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).float()


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
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._move(weight, weight.grad, group)
                        weight.grad = None  # so that AdamW passes it over
        super().step()
        return loss

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = orthogonalized(whole(gradient.lerp(momentum, group["momentum"])), self._dtype)
        size = group["lr"] * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(held_as(direction, weight), alpha=-size)
