"""The vocabulary cut over tensor ranks: rows of the embedding and of the head, and the loss over all of them."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..ops.linear_cross_entropy import Reduction, VocabularyPart, linear_cross_entropy


def shares(vocabulary: int, size: int) -> list[int]:
    """Rows of each of so many ranks, as DTensor cuts them: as many each, but for the last ones."""
    most = -(-vocabulary // size)
    return [min(most, max(0, vocabulary - rank * most)) for rank in range(size)]


def here(tokens: Tensor, mesh: DeviceMesh, vocabulary: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of tokens, 0 for those it lacks, and which it has: both of the shape of the tokens."""
    sizes, rank = shares(vocabulary, mesh.size()), mesh.get_local_rank()
    row = tokens - sizes[0] * rank
    held = (row >= 0) & (row < sizes[rank])
    return torch.where(held, row, 0), held


def cut_loss(
    hidden: Tensor,
    weight: DTensor,
    targets: Tensor,
    learnt: Tensor | None,
    reduction: Reduction,
    *,
    mesh: DeviceMesh,
    vocabulary: int,
) -> Tensor:
    """linear_cross_entropy of a weight whose rows are cut over a mesh.

    Each rank makes the logits of its rows; of a token, two numbers travel: the logarithm of the sum of their
    exponentials, and the target's logit.
    """
    sizes = shares(vocabulary, mesh.size())

    def combine(log_sum: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        found = DTensor.from_local(torch.stack([log_sum, score])[None], mesh, [Shard(0)], run_check=False)
        log_sums, scores = found.redistribute(placements=[Replicate()]).to_local().unbind(1)
        return log_sums.logsumexp(0), scores.sum(0)

    part = VocabularyPart(sizes[0] * mesh.get_local_rank(), sizes[0], combine)
    return linear_cross_entropy(hidden, weight.to_local(), targets, learnt, reduction, part)
