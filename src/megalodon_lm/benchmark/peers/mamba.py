"""Mamba: a selective state space model, with the parallel scan of mambapy on the CPU."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from ...sizing import round_width

LAYERS = 6
CACHES = ("state",)


def build(parameters: int, vocab_size: int) -> nn.Module:
    """See Peer.build.

    Six layers: the scan costs in proportion to layers times width, so at equal parameters few wide layers are the
    faster choice.
    """

    def count(width: int) -> int:
        inner, rank, states = 2 * width, math.ceil(width / 16), 16
        mixer = 2 * width * inner + 5 * inner + inner * (rank + 2 * states) + inner * (rank + 1) + inner * (states + 1)
        return 2 * vocab_size * width + LAYERS * (mixer + inner * width + width) + width

    config = MambaConfig(
        vocab_size=vocab_size,
        hidden_size=round_width(count, parameters),
        num_hidden_layers=LAYERS,
        use_mambapy=True,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return MambaForCausalLM(config)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """See Peer.loss."""
    return model(tokens, labels=tokens, use_cache=False).loss


def prefill(model: nn.Module, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """See Peer.prefill."""
    out = model(tokens, cache=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.cache


def step(model: nn.Module, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """See Peer.step."""
    out = model(tokens, cache=cache, use_cache=True)
    return out.logits[:, -1], cache


def empty_cache(model: nn.Module, kind: str, room: int) -> Any:
    """See Peer.empty_cache."""
    return None


def made_up_cache(model: nn.Module, kind: str, context: int, room: int, dtype: torch.dtype) -> Any:
    """See Peer.made_up_cache. Its size does not depend on the context, so a few tokens make it."""
    return prefill(model, torch.zeros(1, min(context, 8), dtype=torch.int64))[1]


def rewind(cache: Any, tokens: int) -> None:
    """See Peer.rewind. A state does not grow: nothing to do."""
