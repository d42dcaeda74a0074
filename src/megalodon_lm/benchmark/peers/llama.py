"""Llama: a transformer with full causal attention, rotary positions and SwiGLU."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from ...sizing import round_width

LAYERS = 6
HEAD_DIM = 128
LONGEST = 1 << 20  # tokens; rotary positions need no table
CACHES = ("static", "dynamic")


def build(parameters: int, vocab_size: int) -> nn.Module:
    """See Peer.build.

    Six layers, heads of 128, no grouped queries, the fused attention of PyTorch. The width is the narrowest whose
    feed-forward network is at most 3.5 times as wide, because attention costs in proportion to the width.
    """
    unit = HEAD_DIM if parameters > 1_000_000 else 8
    width = unit
    while (hidden := _hidden(parameters, vocab_size, width)) > 3.5 * width:
        width += unit
    attention: Any = {"attn_implementation": "sdpa"}
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, width // HEAD_DIM),
        num_key_value_heads=max(1, width // HEAD_DIM),
        max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **attention,
    )
    return LlamaForCausalLM(config)


def _hidden(parameters: int, vocab_size: int, width: int) -> int:
    def count(hidden: int) -> int:
        layer = 4 * width * width + 3 * width * hidden + 2 * width
        return 2 * vocab_size * width + LAYERS * layer + width

    return round_width(count, parameters)


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
    """See Peer.empty_cache. "static" is preallocated and masked, "dynamic" grows by concatenation."""
    config: Any = model.config
    return StaticCache(config=config, max_cache_len=room) if kind == "static" else DynamicCache(config=config)


def made_up_cache(model: nn.Module, kind: str, context: int, room: int, dtype: torch.dtype) -> Any:
    """See Peer.made_up_cache."""
    config: Any = model.config
    cache = empty_cache(model, kind, context + room)
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), layer)
    return cache


def rewind(cache: Any, tokens: int) -> None:
    """See Peer.rewind."""
    if isinstance(cache, StaticCache):
        layers: Any = cache.layers
        for layer in layers:
            layer.cumulative_length.sub_(tokens)  # what stands behind it is masked, then overwritten
    else:
        cache.crop(-tokens)
