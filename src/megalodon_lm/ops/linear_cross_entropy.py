"""Next-token loss that never holds the logits of all tokens at once."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .derived import rounded

CHUNK_LOGITS = 1 << 24  # logits in memory at a time
Reduction = Literal["mean", "none"]


class VocabularyPart(NamedTuple):
    """Consecutive rows of a weight whose others are elsewhere; every part is given the same hidden and targets.

    Attributes:
        first: token of the first row.
        most: rows of the largest part, so that all parts cut the tokens alike.
        combine: of each token, the logarithm of the sum of exponentials and the logit of its target, (n,) each, as the
            part has them (0 for the logit of a target it lacks) to those of the whole; differentiable.
    """

    first: int
    most: int
    combine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def find(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logarithms of sums and logits of the targets, of the whole; columns of the targets here, and which are.

        Args:
            logits: (n, rows of the part) in float32 or better.
            targets: (n,).

        Returns:
            (n,) each; the column of a target that is not here is 0.
        """
        column = targets - self.first
        here = (column >= 0) & (column < logits.shape[-1])
        column = torch.where(here, column, 0)
        score = torch.where(here, logits.gather(1, column[:, None])[:, 0], 0)
        return *self.combine(logits.logsumexp(-1), score), column, here


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    learnt: Tensor | None = None,
    reduction: Reduction = "mean",
    part: VocabularyPart | None = None,
) -> Tensor:
    """Cross-entropy in nats of the targets under softmax(hidden @ weight.T).

    Args:
        hidden: (..., D).
        weight: (vocabulary, D).
        targets: (...) int64.
        learnt: (...) bool, the targets that count; None for all. Nothing is computed of the others.
        reduction: "mean" over the targets that count, 0 of none; or "none".
        part: of the vocabulary, where the weight holds its rows alone; None for all. The gradient of hidden is then
            the part's share, and those of all parts add up to it.

    Returns:
        A scalar, or (...) with 0 at targets that do not count, in float32 or better. Differentiable with respect to
        hidden and weight: the mean once, its gradients being made along with it; the others by making logits again.
    """
    rows, answers, chosen = hidden.flatten(0, -2), targets.flatten(), None
    if torch.compiler.is_compiling():  # a graph computes all: no size may depend on what counts
        losses = _token_losses(rows, weight, answers, part).view_as(targets)
        counts = torch.ones_like(targets, dtype=torch.bool) if learnt is None else learnt.to(hidden.device)
        losses = torch.where(counts, losses, 0)
        return losses if reduction == "none" else losses.sum() / counts.sum().clamp(min=1)
    if learnt is not None:
        chosen = learnt.flatten().nonzero()[:, 0].to(hidden.device)
        rows, answers = rows[chosen], answers[chosen]
    if reduction == "mean":
        return _MeanLoss.apply(rows, weight, answers, part)
    losses = _token_losses(rows, weight, answers, part)
    if chosen is not None:
        losses = losses.new_zeros(targets.numel()).index_copy(0, chosen, losses)
    return losses.view_as(targets)


class _MeanLoss(torch.autograd.Function):
    """Chunk by chunk; both gradients are computed along with the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, part: VocabularyPart | None) -> Tensor:
        chunk = _tokens_at_a_time(weight, part)
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
                logits, here = (rows @ w.T).to(precise), torch.ones_like(answer, dtype=precise)
                if part is None:
                    log_probs = logits.log_softmax(-1)
                    losses[at : at + chunk] = -log_probs.gather(1, answer)[:, 0]
                else:
                    log_sum, score, *found = part.find(logits, answer[:, 0])
                    losses[at : at + chunk] = log_sum - score
                    log_probs = logits.sub_(log_sum[:, None])
                    answer, here = found[0][:, None], found[1][:, None].to(precise)
                if need_h or need_w:
                    grad = log_probs.exp_().scatter_add_(1, answer, -here).to(dtype)
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
        return *(None if grad is None else (grad * scale).to(dtype) for grad, dtype in made), None, None


def _tokens_at_a_time(weight: Tensor, part: VocabularyPart | None) -> int:
    return max(1, CHUNK_LOGITS // (len(weight) if part is None else part.most))


def _token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, part: VocabularyPart | None) -> Tensor:
    """(n,) in float32 or better of hidden (n, D)."""

    def losses(rows: Tensor, answers: Tensor) -> Tensor:
        logits = F.linear(rows, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if part is None:
            return F.cross_entropy(logits, answers, reduction="none")
        log_sum, score, *_ = part.find(logits, answers)
        return log_sum - score

    chunk, device = _tokens_at_a_time(weight, part), hidden.device.type
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])
    if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
        weight = rounded(weight, torch.get_autocast_dtype(device))
    return torch.cat([losses(*part) for part in parts])
