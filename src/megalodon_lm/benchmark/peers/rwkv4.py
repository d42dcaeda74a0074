"""RWKV, version 4, as transformers has it: on a CPU its recurrence is a loop over tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import RwkvConfig, RwkvForCausalLM

from ...sizing import round_width

LAYERS = 6
CACHES = ("state",)


def build(parameters: int, vocab_size: int) -> nn.Module:
    """See Peer.build.

    Six layers; the width is the narrowest whose feed-forward network is at most 4.5 times as wide, so that the
    recurrence has few channels.
    """
    unit = 64 if parameters > 1_000_000 else 8
    width = unit
    while (hidden := _hidden(parameters, vocab_size, width)) > 4.5 * width:
        width += unit
    config = RwkvConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=LAYERS,
        rescale_every=0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return RwkvForCausalLM(config)


def _hidden(parameters: int, vocab_size: int, width: int) -> int:
    def count(hidden: int) -> int:
        layer = 5 * width * width + 2 * width * hidden + 11 * width
        return 2 * vocab_size * width + LAYERS * layer + 4 * width

    return round_width(count, parameters)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """See Peer.loss."""
    return model(tokens, labels=tokens, use_cache=False).loss


def prefill(model: nn.Module, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """See Peer.prefill."""
    out = model(tokens, state=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.state


def step(model: nn.Module, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """See Peer.step."""
    out = model(tokens, state=cache, use_cache=True)
    return out.logits[:, -1], out.state


def empty_cache(model: nn.Module, kind: str, room: int) -> Any:
    """See Peer.empty_cache."""
    return None


def made_up_cache(model: nn.Module, kind: str, context: int, room: int, dtype: torch.dtype) -> Any:
    """See Peer.made_up_cache. Its size does not depend on the context, so a few tokens make it."""
    return prefill(model, torch.zeros(1, min(context, 8), dtype=torch.int64))[1]


def rewind(cache: Any, tokens: int) -> None:
    """See Peer.rewind. A state does not grow: nothing to do."""
