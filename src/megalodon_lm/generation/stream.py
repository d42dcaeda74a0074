"""Reading in pieces and writing token by token."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError
from ..model.decoder import Megalodon
from ..state import State
from ..training.precision import Precision, autocast, choose_precision
from .decoding import Decoder
from .sampling import Draws, Sampling, sample

PIECE = 4096  # tokens read at a time


@torch.no_grad()  # not inference mode: its states could never be trained on
def read(model: Megalodon, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """Read a prompt of any length in constant memory.

    Args:
        model: in evaluation mode.
        tokens: (B, L) int64, L at least 1.
        state: what came before.

    Returns:
        logits after the last token (B, vocabulary), and the state.
    """
    if tokens.shape[1] == 0:
        raise InputError("the prompt is empty; give at least one token, such as the begin token")
    for piece in tokens.split(PIECE, dim=1):
        logits, state = model(piece, state, logits_to_keep=1)
    assert state is not None
    return logits[:, 0], state


def generate(
    model: Megalodon,
    tokens: Tensor,
    max_tokens: int,
    state: State | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    precision: Precision = "auto",
) -> Iterator[Tensor]:
    """Continue a prompt, to the last token asked for: it knows no tokenizer. Generator ends where a text ends.

    Args:
        model: the model; its dropout is left as it is, call model.eval() first.
        tokens: (B, L) int64 prompt, L at least 1.
        max_tokens: tokens to write.
        state: what was read before the prompt.
        temperature, top_k, top_p: see Sampling.
        seed: of the draws of the first row; those of the next rows follow it.
        precision: see Decoder.

    Yields:
        (B,) int64 tokens, as they are drawn.
    """
    sampling = Sampling(max_tokens, temperature, top_k, top_p)
    draws = Draws([seed + row for row in range(len(tokens))])
    device = tokens.device
    with autocast(choose_precision(precision, device), device):
        logits, state = read(model, tokens, state)
    decoder = Decoder(model, state, precision)
    for count in range(max_tokens):
        token = sample(logits, sampling, draws.next()).to(device)
        yield token
        if count + 1 < max_tokens:
            logits = decoder.step(token)
