"""One token at a time on the CPU: each layer is one compiled call, and nothing is allocated from step to step."""

import math

import numpy as np
import torch
from torch import Tensor

from ..model.decoder import Megalodon
from ..ops.cpu import decoding_kernels as kernels
from ..ops.cpu.simd import as_numpy
from ..ops.cpu.team import num_threads
from ..state import State
from .decoding_rows import DecodingRows
from .decoding_weights import prepare


class FusedStep:
    """A model's prepared weights, and the states of B rows that the steps change in place.

    Args:
        model: that decoding_weights.fits; later changes of its weights may go unseen.
        state: after the prompt; it is copied.
        dtype: of the weights in products and of the attention cache, float32 or bf16.
    """

    def __init__(self, model: Megalodon, state: State, dtype: torch.dtype):
        self.model = model
        self.weights = prepare(model, dtype)
        self.rows = DecodingRows(model, self.weights.sizes, state.batch_size, dtype)
        self.rows.enter(state)
        self._sizes = kernels.plain(self.weights.sizes)
        scratch = kernels.Scratch.make(state.batch_size, self.weights.sizes)
        self._scratch = kernels.plain(scratch)
        layers = zip(self.weights.layers, self.rows.layers, strict=True)
        self._layers = [(kernels.plain(weights), kernels.plain(rows)) for weights, rows in layers]
        self._head = kernels.plain((self.weights.head, self.rows.norm, scratch.normed, scratch.ones))
        self._x = np.zeros(state.batch_size * self.weights.sizes.model_dim, np.float32)
        self._logits = torch.zeros(state.batch_size, len(model.output.output.weight))

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row.

        Args:
            tokens: (B,) int64, inside the vocabulary.

        Returns:
            logits (B, vocabulary) float32 of the next token, overwritten by the next step.
        """
        embed = self.model.embed
        x = embed.weight.detach()[tokens].float().view(-1)
        self._x[:] = (x * math.sqrt(embed.embedding_dim) if embed.scaled else x).numpy()
        common = (num_threads(), len(tokens), self._sizes, self.weights.eps, self._x)
        for weights, rows in self._layers:
            kernels.layer(*common, weights, rows, self._scratch)
        kernels.head(*common, *self._head, as_numpy(self._logits).reshape(-1))
        self.rows.position += 1
        return self._logits

    def state(self) -> State:
        """A copy of the state, as the model takes it."""
        return self.rows.state()
