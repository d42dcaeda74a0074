"""Loss against context: how well a model predicts a text when it may look back 64 tokens, 1,024, or to its start."""

import bz2
import gzip
import lzma
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..model.decoder import Megalodon
from ..training.loss import token_losses
from ..training.precision import autocast

BATCH_TOKENS = 8192
_PIECE = 2048


@torch.inference_mode()
def score(
    model: Megalodon,
    tokens: Tensor,
    begin: int,
    context: int | None = None,
    precision: Literal["bf16", "float32"] = "float32",
    watch: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Negative log likelihood of every token of one document, in constant memory.

    The document is cut into windows of `context` tokens. Each is read from an empty state behind a begin token, so that
    the t-th token of a window is predicted from t tokens of context.

    Args:
        model: the model; its dropout is switched off.
        tokens: (N,) int64.
        begin: the begin token.
        context: tokens in a window; None for one window over everything.
        precision: of the matrix products.
        watch: called with the number of tokens scored since the last call.

    Returns:
        (N,) float64 in nats.
    """
    model.eval()
    total = len(tokens)
    context = min(context or total, total)
    windows = -(-total // context)
    padded = torch.full((windows * context,), begin)
    padded[:total] = tokens
    targets = padded.view(windows, context)
    inputs = torch.cat([torch.full((windows, 1), begin), targets[:, :-1]], 1)
    rows = max(1, BATCH_TOKENS // min(context, _PIECE))
    piece = min(context, max(_PIECE, BATCH_TOKENS // min(rows, windows)))
    device = next(model.parameters()).device
    losses = torch.zeros(windows, context, dtype=torch.float64)
    for row in range(0, windows, rows):
        state = None
        for at in range(0, context, piece):
            span = (slice(row, row + rows), slice(at, at + piece))
            with autocast(precision, device):
                logits, state = model(inputs[span].to(device), state)
            losses[span] = token_losses(logits, targets[span].to(device)).double().cpu()
            watch(losses[span].numel())
    return losses.view(-1)[:total].numpy()


def bits_per_byte(losses: np.ndarray, num_bytes: int) -> float:
    """Sum of losses in nats over a text of so many bytes."""
    return float(losses.sum() / math.log(2) / num_bytes)


def by_position(losses: np.ndarray, context: int) -> dict[int, float]:
    """Mean loss in bits by position in the window, in buckets that end at powers of two and at the context.

    Returns:
        {last position of the bucket: bits per token}; the first buckets end at 1, 2, 4, ...
    """
    position = np.arange(len(losses)) % context
    ends = [1 << k for k in range(math.ceil(math.log2(context)))] + [context]
    found, low = {}, 0
    for end in ends:
        inside = (position >= low) & (position < end)
        if inside.any():
            found[end] = float(losses[inside].mean() / math.log(2))
        low = end
    return found


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors on the same text, at their strongest settings."""
    sizes = {
        "gzip": len(gzip.compress(text, 9)),
        "xz": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        "bzip2": len(bz2.compress(text, 9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
