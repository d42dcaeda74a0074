"""Which parts a configuration asks for: the one place that turns choices into layers."""

from typing import Any, Protocol

from ..config import NUM_TAPS, CemaKind, InitMode, ModelConfig
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


class BlockConfig(Protocol):
    """What the blocks of decoders and of encoders have in common; see ModelConfig."""

    @property
    def model_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def z_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def ffn_hidden_dim(self) -> int: ...
    @property
    def cema_ndim(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def swiglu(self) -> bool: ...
    @property
    def rescale_nffn(self) -> bool: ...
    @property
    def init_mode(self) -> InitMode: ...
    @property
    def dropout(self) -> float: ...
    @property
    def hidden_dropout(self) -> float: ...
    @property
    def residual(self) -> str: ...
    @property
    def cema(self) -> CemaKind: ...


def build_embedding(config: ModelConfig) -> Embedding:
    """Tokens to the input of the first block."""
    return Embedding(config.vocab_size, config.model_dim, config.scale_emb, config.dropout)


def build_block(config: ModelConfig, layer: int) -> Block:
    """Block number `layer`, from 0."""
    return Block(build_mixer(config), build_feed_forward(config, layer), two_hop=config.residual == "two_hop")


def build_feed_forward(config: BlockConfig, layer: int) -> FeedForward:
    """That of block number `layer`."""
    c = config
    return FeedForward(
        LayerNorm(c.model_dim, c.norm_eps),
        dim=c.model_dim,
        hidden_dim=c.ffn_hidden_dim,
        gated=c.swiglu,
        scale=0.1 * 0.5**layer if c.rescale_nffn else None,
        init=INITIALISERS[c.init_mode],
        hidden_dropout=c.hidden_dropout,
        dropout=c.dropout,
    )


def build_mixer(config: ModelConfig) -> GatedAttention | ConvolutionalAttention:
    """That of a block."""
    c = config
    norm = build_timestep_norm(c) if c.attention_norm == "timestep" else EntryLayerNorm(c.model_dim, c.norm_eps)
    given: dict[str, Any] = {**mixer_sizes(c), "normalized": c.normalize_attention}
    if c.mixer == "convolution":
        return ConvolutionalAttention(norm, build_attention(c), build_memory(c), num_taps=NUM_TAPS, **given)
    average = None if c.cema == "none" else ComplexEMA(c.model_dim, c.cema_ndim, c.cema == "complex", c.cema_omega)
    rmsnorm = RMSNorm(c.model_dim, c.norm_eps)
    return GatedAttention(norm, average, rmsnorm, build_attention(c), build_memory(c), **given)


def mixer_sizes(config: BlockConfig) -> dict[str, Any]:
    """Widths, initial values and dropout of a mixer, by the names of its arguments."""
    c = config
    return dict(
        dim=c.model_dim,
        z_dim=c.z_dim,
        value_dim=c.value_dim,
        z_head_dim=c.z_dim // c.num_heads,
        value_head_dim=c.value_dim // c.num_heads,
        eps=c.norm_eps,
        init=INITIALISERS[c.init_mode],
        hidden_dropout=c.hidden_dropout,
        dropout=c.dropout,
    )


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
