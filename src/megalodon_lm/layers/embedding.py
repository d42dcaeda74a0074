"""The embedding of tokens: what the first block reads."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from .initialization import Initialiser, init_embedding


class Embedding(nn.Embedding):
    """Rows of the weight, times sqrt(D) where `scaled`, with dropout."""

    def __init__(self, vocab_size: int, dim: int, scaled: bool, dropout: float, init: Initialiser = init_embedding):
        super().__init__(vocab_size, dim)
        self.scaled, self.dropout, self.init = scaled, dropout, init

    def reset_parameters(self) -> None:
        """Nothing: PyTorch's constructor would draw here."""

    def init_weights(self) -> None:
        """Draw the weight."""
        self.init(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) int64 to (B, L, D)."""
        x = super().forward(tokens)
        if self.scaled:
            x = x * math.sqrt(self.embedding_dim)
        return F.dropout(x, self.dropout, self.training)
