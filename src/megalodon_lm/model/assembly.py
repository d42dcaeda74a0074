"""Which parts a configuration asks for: the one place that turns choices into layers."""

from ..config import ModelConfig
from ..layers.block import Block
from ..layers.chunk_attention import ChunkAttention
from ..layers.complex_ema import ComplexEMA
from ..layers.embedding import Embedding
from ..layers.feed_forward import FeedForward
from ..layers.gated_attention import GatedAttention
from ..layers.initialization import INITIALISERS
from ..layers.norms import LayerNorm, RMSNorm, TimestepNorm


def build_embedding(config: ModelConfig) -> Embedding:
    """Tokens to the input of the first block."""
    return Embedding(config.vocab_size, config.model_dim, config.scale_emb, config.dropout)


def build_block(config: ModelConfig, layer: int) -> Block:
    """Block number `layer`, from 0."""
    c, init = config, INITIALISERS[config.init_mode]
    mixer = GatedAttention(
        build_timestep_norm(c),
        ComplexEMA(c.model_dim, c.cema_ndim),
        RMSNorm(c.model_dim, c.norm_eps),
        ChunkAttention(c.chunk_size, c.rope_base, c.attention_dropout, c.drop_keys),
        dim=c.model_dim,
        z_dim=c.z_dim,
        value_dim=c.value_dim,
        z_head_dim=c.z_dim // c.num_heads,
        value_head_dim=c.value_dim // c.num_heads,
        eps=c.norm_eps,
        init=init,
        hidden_dropout=c.hidden_dropout,
        dropout=c.dropout,
    )
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
    return Block(mixer, feed_forward)


def build_timestep_norm(config: ModelConfig) -> TimestepNorm:
    """That of a block, or the final one."""
    return TimestepNorm(config.model_dim, config.model_dim // config.norm_num_groups, config.norm_eps)
