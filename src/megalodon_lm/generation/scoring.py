"""How well a model predicts: the loss of every token that it reads, piece by piece."""

import math

from torch import Tensor

from ..errors import Diverged
from ..model.language_model import LanguageModel
from ..state import State
from ..training.precision import Precision, autocast, choose_precision


def token_losses(
    model: LanguageModel,
    tokens: Tensor,
    targets: Tensor,
    state: State | None,
    precision: Precision,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Read a piece, and score it.

    Args:
        model: in evaluation mode.
        tokens: (B, L) int64.
        targets: (B, L) int64, the token after each.
        state: what came before, or None for nothing.
        precision: of matrix products.
        document_starts: see Decoder.forward.

    Returns:
        Loss of each target in nats, (B, L) float64 on the CPU, and the state after the piece.

    Raises:
        Diverged: a loss is NaN or infinite, so that no figure rests on it.
    """
    device = next(model.parameters()).device
    with autocast(choose_precision(precision, device), device):
        losses, state = model(
            tokens.to(device), state, targets=targets.to(device), reduction="none", document_starts=document_starts
        )
    nats = losses.double().cpu()
    if not math.isfinite(total := nats.sum().item()):
        raise Diverged(
            f"the model's loss is not finite ({total}): its weights hold NaN or infinity, or a product overflowed; try "
            "another checkpoint, or float32 precision"
        )
    return nats, state
