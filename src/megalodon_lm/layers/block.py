"""One block of the decoder.

What a decoder asks of a block: a `state_spec`, the tree of what it carries (state_spec.declare), {} or None for
nothing; a forward from x, its entry state and the boundaries of the piece to x and its exit state; `init_weights` in
each module that owns parameters; and, in one that owns parameters which weight decay must pass over, their names in
`spared`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.block import BlockSizes, BlockWeights, read_block
from ..ops.boundaries import Boundaries
from ..state_spec import Sealed, Tree
from .chunk_attention import ChunkAttention
from .complex_ema import ComplexEMA
from .convolutional_attention import ConvolutionalAttention
from .feed_forward import FeedForward
from .gated_attention import GatedAttention
from .linear import is_heard, may_join
from .norms import LayerNorm, RMSNorm, TimestepNorm

# The parts that the op of a whole block knows, in the order of `_whole`.
_PARTS = (GatedAttention, FeedForward, TimestepNorm, ComplexEMA, RMSNorm, ChunkAttention, LayerNorm)


class Block(nn.Module):
    """A mixer of tokens and a feed-forward network.

    Args:
        mixer: (x, entry state, boundaries) to x plus its branch, and the exit state.
        feed_forward: (y, residual) to the residual plus its branch.
        two_hop: the network adds to the block's input (Megalodon), and not to its own (Gecko).
    """

    def __init__(self, mixer: GatedAttention | ConvolutionalAttention, feed_forward: FeedForward, two_hop: bool = True):
        super().__init__()
        self.mega, self.nffn, self.two_hop = mixer, feed_forward, two_hop

    @property
    def state_spec(self) -> Tree:
        """That of the mixer."""
        return self.mega.state_spec

    def forward(
        self, x: Tensor, state: Sealed | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, Tree]:
        """x (B, L, D) and the mixer's entry state to (B, L, D) and its exit state."""
        entry = None if state is None else state.tree
        if boundaries is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            whole = self._whole(x)
            if whole is not None:
                return read_block(x, *whole, entry)
        y, leaving = self.mega(x, entry, boundaries)
        return self.nffn(y, x if self.two_hop else y), leaving

    def _whole(self, x: Tensor) -> tuple[BlockWeights, BlockSizes] | None:
        """What the op of a whole block takes, where this is one of its kind, unchanged, and nobody listens inside."""
        mega: Any = self.mega
        ffn: Any = self.nffn
        if (type(mega), type(ffn)) != _PARTS[:2] or self.training:
            return None
        norm, cema, attention = mega.timenorm, mega.cema, mega.attention
        parts = (mega, ffn, norm, cema, mega.rmsnorm, attention, ffn.norm)
        if tuple(map(type, parts)) != _PARTS or any(map(is_heard, parts)) or not mega.normalized:
            return None
        eps = {mega.eps, norm.eps, mega.rmsnorm.eps, ffn.norm.eps}
        if len(eps) > 1 or mega.memory is not None or ffn.alpha is not None or cema.theta is None or cema.omega is None:
            return None
        layers = [mega.wv, mega.wz, mega.wr, mega.wh1, mega.wh2, ffn.fc1, ffn.fc2, ffn.fc3]
        if not may_join(x, *(layer for layer in layers if layer is not None)):
            return None
        given: list[Any] = [None if layer is None else (layer.weight, layer.bias) for layer in layers]
        average = (cema.alpha, cema.delta, cema.theta, cema.gamma, cema.omega)
        mixer = ((norm.weight, norm.bias), average, mega.rmsnorm.weight, (mega.gamma, mega.beta))
        weights = BlockWeights._make((*mixer, *given[:5], (ffn.norm.weight, ffn.norm.bias), *given[5:]))
        groups, places = len(norm.weight) // norm.group_dim, (attention.rope_base, attention.heads_without_rope)
        widths = (groups, mega.z_head_dim, mega.value_head_dim, attention.chunk_size)
        return weights, BlockSizes(*widths, *places, norm.eps, self.two_hop)
