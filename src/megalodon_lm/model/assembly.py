"""Which parts a configuration asks for: the one place that turns choices into layers."""

from typing import Any

from ..config import NUM_TAPS, ModelConfig
from ..layers.adaptive_memory import AdaptiveMemory
from ..layers.block import Block
from ..layers.chunk_attention import ChunkAttention
from ..layers.complex_ema import ComplexEMA
from ..layers.convolutional_attention import ConvolutionalAttention
from ..layers.embedding import Embedding
from ..layers.feed_forward import FeedForward
from ..layers.gated_attention import GatedAttention
from ..layers.initialization import INITIALISERS
from ..layers.norms import DecayNorm, EntryLayerNorm, LayerNorm, NormOverTime, RMSNorm, TimestepNorm
from ..layers.sliding_attention import SlidingAttention


def build_embedding(config: ModelConfig) -> Embedding:
    """Tokens to the input of the first block."""
    return Embedding(config.vocab_size, config.model_dim, config.scale_emb, config.dropout)


def build_block(config: ModelConfig, layer: int) -> Block:
    """Block number `layer`, from 0."""
    c, init = config, INITIALISERS[config.init_mode]
    feed_forward = FeedForward(
        LayerNorm(c.model_dim, c.norm_eps),
        dim=c.model_dim,
        hidden_dim=c.ffn_hidden_dim,
        gated=c.swiglu,
        scale=0.1 * 0.5**layer if c.rescale_nffn else None,
        init=init,
        hidden_dropout=c.hidden_dropout,
        dropout=c.dropout,
    )
    return Block(build_mixer(c), feed_forward, two_hop=c.residual == "two_hop")


def build_mixer(config: ModelConfig) -> GatedAttention | ConvolutionalAttention:
    """That of a block."""
    c = config
    norm = build_timestep_norm(c) if c.attention_norm == "timestep" else EntryLayerNorm(c.model_dim, c.norm_eps)
    given: dict[str, Any] = dict(
        dim=c.model_dim,
        z_dim=c.z_dim,
        value_dim=c.value_dim,
        z_head_dim=c.z_dim // c.num_heads,
        value_head_dim=c.value_dim // c.num_heads,
        eps=c.norm_eps,
        normalized=c.normalize_attention,
        init=INITIALISERS[c.init_mode],
        hidden_dropout=c.hidden_dropout,
        dropout=c.dropout,
    )
    if c.mixer == "convolution":
        return ConvolutionalAttention(norm, build_attention(c), build_memory(c), num_taps=NUM_TAPS, **given)
    average = None if c.cema == "none" else ComplexEMA(c.model_dim, c.cema_ndim, c.cema == "complex", c.cema_omega)
    rmsnorm = RMSNorm(c.model_dim, c.norm_eps)
    return GatedAttention(norm, average, rmsnorm, build_attention(c), build_memory(c), **given)


def build_attention(config: ModelConfig) -> ChunkAttention | SlidingAttention:
    """That of a block."""
    c = config
    given = (c.chunk_size, c.rope_base, c.attention_dropout, c.drop_keys, c.heads_without_rope)
    return ChunkAttention(*given) if c.attention == "chunk" else SlidingAttention(*given)


def build_memory(config: ModelConfig) -> AdaptiveMemory | None:
    """That of a block, if there is one: it takes over where attention ends."""
    if config.memory == "none":
        return None
    return AdaptiveMemory(config.chunk_size, lag=2 if config.attention == "sliding" else 1)


def build_timestep_norm(config: ModelConfig) -> NormOverTime:
    """That of a block, or the final one."""
    norm = {"cumulative": TimestepNorm, "decay": DecayNorm}[config.timestep_norm]
    return norm(config.model_dim, config.model_dim // config.norm_num_groups, config.norm_eps)
