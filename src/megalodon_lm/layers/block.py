"""One block of the decoder."""

from torch import Tensor, nn

from ..ops.boundaries import Boundaries
from ..state_spec import Sealed, Tree
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

    @property
    def state_spec(self) -> Tree:
        """That of the mixer."""
        return self.mega.state_spec

    def forward(
        self, x: Tensor, state: Sealed | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, Tree]:
        """x (B, L, D) and the mixer's entry state to (B, L, D) and its exit state."""
        y, leaving = self.mega(x, None if state is None else state.tree, boundaries)
        return self.nffn(y, x), leaving
