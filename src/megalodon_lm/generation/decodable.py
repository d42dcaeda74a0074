"""Which models compiled steps of one token can run: those made of the very parts that they know."""

from typing import Any, TypeGuard

import torch
from torch import nn

from ..layers.adaptive_memory import AdaptiveMemory
from ..layers.block import Block
from ..layers.chunk_attention import ChunkAttention
from ..layers.complex_ema import ComplexEMA
from ..layers.embedding import Embedding
from ..layers.feed_forward import FeedForward
from ..layers.gated_attention import GatedAttention
from ..layers.linear import Linear
from ..layers.norms import DecayNorm, EntryLayerNorm, LayerNorm, RMSNorm, TimestepNorm
from ..layers.sliding_attention import SlidingAttention
from ..model.decoder import Head
from ..model.language_model import LanguageModel
from ..model.megalodon import Megalodon
from ..ops.cpu.simd import LANES
from .decoding_weights import choices_of, sizes_of

_OVER_TIME = (TimestepNorm, DecayNorm)
_ABSENT = type(None)
# A part by its name, and what it may be.
_BLOCK: dict[str, tuple[type, ...]] = {
    "": (Block,),
    "mega": (GatedAttention,),
    "mega.timenorm": (*_OVER_TIME, EntryLayerNorm),
    "mega.cema": (ComplexEMA, _ABSENT),
    "mega.rmsnorm": (RMSNorm,),
    "mega.attention": (ChunkAttention, SlidingAttention),
    "mega.memory": (AdaptiveMemory, _ABSENT),
    **{f"mega.{name}": (Linear,) for name in ("wv", "wz", "wr", "wh1", "wh2")},
    "nffn": (FeedForward,),
    "nffn.norm": (LayerNorm,),
    **{f"nffn.{name}": (Linear,) for name in ("fc1", "fc2")},
    "nffn.fc3": (Linear, _ABSENT),
}
_HEAD: dict[str, tuple[type, ...]] = {"": (Head,), "final_norm": _OVER_TIME, "output": (Linear,)}


def fits(model: LanguageModel) -> TypeGuard[Megalodon]:
    """Whether compiled steps can run a model.

    It is made of the very parts that they know, all blocks alike and of the same widths, these multiples of 16, and
    without dropout; its weights are float32 or bf16 on the CPU, and all here.
    """
    if not isinstance(model, Megalodon):
        return False
    blocks: list[Any] = list(model.layers)
    parts = list(model.modules())
    dropped = model.training and any(getattr(part, name, 0) for part in parts for name in ("dropout", "hidden_dropout"))
    plain = all(
        p.device.type == "cpu" and p.dtype in (torch.float32, torch.bfloat16) and not hasattr(p, "full_tensor")
        for p in model.parameters()
    )
    known = (
        type(model.embed) is Embedding and _made_of(model.output, _HEAD) and all(_made_of(b, _BLOCK) for b in blocks)
    )
    if dropped or not plain or not known:
        return False
    norm: Any = model.output.final_norm
    sizes = sizes_of(blocks[0], norm)
    memories = [block.mega.memory for block in blocks]
    alike = (
        {(sizes_of(block, norm), choices_of(block, norm), _kinds(block)) for block in blocks},
        {block.mega.attention.rope_base for block in blocks},
        {(type(part), part.group_dim) for part in parts if isinstance(part, _OVER_TIME)},
        {part.eps for part in parts if hasattr(part, "eps")},
        {(sizes.chunk_size, sizes.num_chunks), *((m.chunk_size, m.lag) for m in memories if m is not None)},
    )
    widths = (sizes.model_dim, sizes.hidden_dim, sizes.z_head_dim, sizes.value_head_dim)
    return all(width % LANES == 0 for width in widths) and all(len(values) == 1 for values in alike)


def _kinds(module: nn.Module) -> tuple[tuple[str, type], ...]:
    return tuple((name, type(part)) for name, part in module.named_modules())


def _made_of(module: nn.Module, parts: dict[str, tuple[type, ...]]) -> bool:
    found = dict(_kinds(module))
    return found.keys() <= parts.keys() and all(found.get(name, _ABSENT) in kinds for name, kinds in parts.items())
