"""One block of the decoder."""

from torch import Tensor, nn

from ..ops.boundaries import Boundaries
from ..state import LayerState
from .feed_forward import FeedForward
from .gated_attention import GatedAttention


class Block(nn.Module):
    """A mixer of tokens and a feed-forward network with the two-hop residual: the second adds to the block's input.

    Args:
        mixer: (x, entry state, boundaries) to x plus its branch, and the exit state.
        feed_forward: (y, residual) to the residual plus its branch.
    """

    def __init__(self, mixer: GatedAttention, feed_forward: FeedForward):
        super().__init__()
        self.mega, self.nffn = mixer, feed_forward

    def forward(
        self, x: Tensor, state: LayerState | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, LayerState]:
        """x (B, L, D) to (B, L, D), and the layer's exit state."""
        y, state = self.mega(x, state, boundaries)
        return self.nffn(y, x), state
