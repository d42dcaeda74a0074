"""One block of the decoder.

What a decoder asks of a block: a `state_spec`, the tree of what it carries (state_spec.declare), {} or None for
nothing; a forward from x, its entry state and the boundaries of the piece to x and its exit state; `init_weights` in
each module that owns parameters; and, in one that owns parameters which weight decay must pass over, their names in
`spared`.
"""

from torch import Tensor, nn

from ..ops.boundaries import Boundaries
from ..state_spec import Sealed, Tree
from .convolutional_attention import ConvolutionalAttention
from .feed_forward import FeedForward
from .gated_attention import GatedAttention


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
        y, leaving = self.mega(x, None if state is None else state.tree, boundaries)
        return self.nffn(y, x if self.two_hop else y), leaving
