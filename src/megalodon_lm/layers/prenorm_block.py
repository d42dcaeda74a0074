"""A block with plain residual branches, each behind a norm of its own."""

from torch import Tensor, nn

from ..ops.boundaries import Boundaries
from ..ops.residual import add_branch
from ..state_spec import Sealed, Tree
from .feed_forward import FeedForward
from .norms import RMSNorm


class PrenormBlock(nn.Module):
    """x + mixer(norm(x)), then a feed-forward network where there is one.

    Args:
        norm: of the mixer's input.
        mixer: (x, entry state or None, boundaries) to its branch and the exit state; it has a `state_spec`.
        feed_forward: with its own norm; None for none.
    """

    def __init__(self, norm: RMSNorm, mixer: nn.Module, feed_forward: FeedForward | None = None):
        super().__init__()
        self.norm, self.mixer, self.feed_forward = norm, mixer, feed_forward

    @property
    def state_spec(self) -> Tree:
        """That of the mixer."""
        return self.mixer.state_spec

    def forward(
        self, x: Tensor, state: Sealed | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, Tree]:
        """x (B, L, D) and the mixer's entry state to (B, L, D) and its exit state."""
        branch, leaving = self.mixer(self.norm(x), None if state is None else state.tree, boundaries)
        x = add_branch(x, branch)
        return (x if self.feed_forward is None else self.feed_forward(x, x)), leaving
