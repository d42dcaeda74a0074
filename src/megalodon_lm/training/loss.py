"""Next-token loss that never holds the logits of all tokens at once."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..errors import InputError

CHUNK_LOGITS = 1 << 24  # logits in memory at a time


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden @ weight.T, chunk by chunk; both gradients are computed along with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        chunk = max(1, CHUNK_LOGITS // len(weight))
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            dtype = compute or torch.promote_types(hidden.dtype, weight.dtype)
            w, h = weight.to(dtype), hidden.to(dtype)
            precise = torch.promote_types(dtype, torch.float32)
            need_h, need_w = ctx.needs_input_grad[:2]
            losses = torch.empty(len(h), dtype=precise, device=h.device)
            grad_h = torch.empty_like(h) if need_h else None
            grad_w = torch.zeros(w.shape, dtype=precise, device=w.device) if need_w else None
            for at in range(0, len(h), chunk):
                rows, answer = h[at : at + chunk], targets[at : at + chunk, None]
                log_probs = (rows @ w.T).to(precise).log_softmax(-1)
                losses[at : at + chunk] = -log_probs.gather(1, answer)[:, 0]
                if need_h or need_w:
                    grad = log_probs.exp_().scatter_add_(1, answer, -torch.ones_like(answer, dtype=precise)).to(dtype)
                    if grad_h is not None:
                        grad_h[at : at + chunk] = grad @ w
                    if grad_w is not None:
                        grad_w += grad.T @ rows
        ctx.grads = (grad_h, grad_w)
        ctx.count = len(h)
        ctx.types = (hidden.dtype, weight.dtype)
        return losses.mean()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> Any:
        scale = grads[0] / ctx.count  # type: ignore[attr-defined]
        grad_h, grad_w = ctx.grads  # type: ignore[attr-defined]
        types = ctx.types  # type: ignore[attr-defined]
        return (
            None if grad_h is None else (grad_h * scale).to(types[0]),
            None if grad_w is None else (grad_w * scale).to(types[1]),
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, learnt: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of the targets under softmax(hidden @ weight.T).

    Args:
        hidden: (..., D).
        weight: (vocabulary, D).
        targets: (...) int64.
        learnt: (...) bool, the targets that count, at least one; None for all.

    Returns:
        A scalar in float32 or better. Differentiable once, with respect to hidden and weight.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if learnt is not None:
        chosen = learnt.flatten().nonzero()[:, 0].to(hidden.device)
        hidden, targets = hidden[chosen], targets[chosen]
    return _LinearCrossEntropy.apply(hidden, weight, targets)


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each target under softmax(hidden @ weight.T); not made to be differentiated.

    Args:
        hidden: (B, L, D).
        weight: (vocabulary, D).
        targets: (B, L) int64.

    Returns:
        (B, L) in float32 or better.
    """
    chunk = max(1, CHUNK_LOGITS // len(weight))

    def losses(rows: Tensor, answers: Tensor) -> Tensor:
        logits = F.linear(rows, weight)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), answers, reduction="none")

    parts = zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
    return torch.cat([losses(*part) for part in parts]).view_as(targets)


def check_loss(nats: float) -> None:
    """Refuse a loss that says nothing, so that no figure rests on it.

    Raises:
        InputError: NaN or infinite.
    """
    if not math.isfinite(nats):
        raise InputError(
            f"the model's loss is not finite ({nats}): its weights hold NaN or infinity, or a product overflowed; try "
            "another checkpoint, or float32 precision"
        )
