"""Adding the branches of a block to its stream."""

from torch import Tensor

from .backend import op


@op()
def add_branch(x: Tensor, branch: Tensor, other: Tensor | None = None) -> Tensor:
    """x + branch, or x + (branch + other), elementwise.

    Args:
        x: the residual stream, float32 or of the branches' type.
        branch, other: of the shape of x and of one type, in which they are added up.

    Returns:
        In the wider of both types.
    """
    return x + (branch if other is None else branch + other)
