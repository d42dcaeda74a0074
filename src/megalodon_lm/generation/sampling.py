"""From logits to a token."""

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row.

    Args:
        logits: (B, vocabulary).
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together hold this probability.
        generator: source of randomness, on the CPU.

    Returns:
        (B,) int64.

    Raises:
        ValueError: a setting outside its range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float().cpu() / temperature
    if top_k and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Refuse settings outside their range.

    Raises:
        ValueError: naming the setting, its value and its range.
    """
    if temperature < 0:
        raise ValueError(f"temperature = {temperature} must be at least 0; 0 takes the most likely token")
    if top_k < 0:
        raise ValueError(f"top_k = {top_k} must be at least 0; 0 keeps every token")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} must be above 0 and at most 1; 1 keeps every token")
