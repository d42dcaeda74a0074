"""One block of the decoder."""

from torch import Tensor, nn

from ..config import ModelConfig
from ..ops.boundaries import Boundaries
from ..state import LayerState
from .feed_forward import FeedForward
from .gated_attention import GatedAttention


class Block(nn.Module):
    """Gated attention and feed-forward with the two-hop residual: the second half adds to the block's input."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.mega = GatedAttention(config)
        self.nffn = FeedForward(config, layer)

    def forward(
        self, x: Tensor, state: LayerState | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, LayerState]:
        """x (B, L, D) to (B, L, D), and the layer's exit state."""
        y, state = self.mega(x, state, boundaries)
        return self.nffn(y, x), state
