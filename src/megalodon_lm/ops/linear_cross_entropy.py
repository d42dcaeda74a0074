"""Next-token loss that never holds the logits of all tokens at once."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .derived import rounded

CHUNK_LOGITS = 1 << 24  # logits in memory at a time
Reduction = Literal["mean", "none"]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, learnt: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy in nats of the targets under softmax(hidden @ weight.T).

    Args:
        hidden: (..., D).
        weight: (vocabulary, D).
        targets: (...) int64.
        learnt: (...) bool, the targets that count; None for all. Nothing is computed of the others.
        reduction: "mean" over the targets that count, 0 of none; or "none".

    Returns:
        A scalar, or (...) with 0 at targets that do not count, in float32 or better. Differentiable with respect to
        hidden and weight: the mean once, its gradients being made along with it; the others by making logits again.
    """
    rows, answers, chosen = hidden.flatten(0, -2), targets.flatten(), None
    if torch.compiler.is_compiling():  # a graph computes all: no size may depend on what counts
        losses = _token_losses(rows, weight, answers).view_as(targets)
        counts = torch.ones_like(targets, dtype=torch.bool) if learnt is None else learnt.to(hidden.device)
        losses = torch.where(counts, losses, 0)
        return losses if reduction == "none" else losses.sum() / counts.sum().clamp(min=1)
    if learnt is not None:
        chosen = learnt.flatten().nonzero()[:, 0].to(hidden.device)
        rows, answers = rows[chosen], answers[chosen]
    if reduction == "mean":
        return _MeanLoss.apply(rows, weight, answers)
    losses = _token_losses(rows, weight, answers)
    if chosen is not None:
        losses = losses.new_zeros(targets.numel()).index_copy(0, chosen, losses)
    return losses.view_as(targets)


class _MeanLoss(torch.autograd.Function):
    """Chunk by chunk; both gradients are computed along with the loss."""

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
        ctx.save_for_backward(grad_h, grad_w)
        ctx.count = max(1, len(h))
        ctx.types = (hidden.dtype, weight.dtype)
        return losses.mean() if len(h) else losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scale = grads[0] / ctx.count
        made = zip(ctx.saved_tensors, ctx.types, strict=True)
        return *(None if grad is None else (grad * scale).to(dtype) for grad, dtype in made), None


def _token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(n,) in float32 or better of hidden (n, D)."""

    def losses(rows: Tensor, answers: Tensor) -> Tensor:
        logits = F.linear(rows, weight)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), answers, reduction="none")

    chunk, device = max(1, CHUNK_LOGITS // len(weight)), hidden.device.type
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        weight = rounded(weight, torch.get_autocast_dtype(device))
    return torch.cat([losses(*part) for part in parts])
