"""What the first block reads where the input is no tokens: numbers, or patches of them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initialization import Initialiser


class NumberEmbedding(nn.Module):
    """x * weight + bias for each number of a sequence, with dropout.

    The weight starts normal with std 1, the bias with std 0.1.
    """

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.dropout = dropout

    @property
    def embedding_dim(self) -> int:
        """Features of the result."""
        return len(self.weight)

    def init_weights(self) -> None:
        """Draw weight and bias."""
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L) to (B, L, D)."""
        return F.dropout(x.to(self.weight.dtype)[..., None] * self.weight + self.bias, self.dropout, self.training)


class PatchEmbedding(nn.Linear):
    """A linear map of the numbers of a patch, with dropout."""

    def __init__(self, patch_dim: int, dim: int, dropout: float, init: Initialiser):
        super().__init__(patch_dim, dim)
        self.dropout, self.init = dropout, init

    @property
    def embedding_dim(self) -> int:
        """Features of the result."""
        return self.out_features

    def reset_parameters(self) -> None:
        """Nothing: PyTorch's constructor would draw here."""

    def init_weights(self) -> None:
        """Draw the weight."""
        self.init(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, patch_dim) to (B, L, D)."""
        return F.dropout(super().forward(x.to(self.weight.dtype)), self.dropout, self.training)
