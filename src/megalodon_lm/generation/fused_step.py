"""One token at a time on the CPU: each layer is one compiled call, and nothing is allocated from step to step."""

import math

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
        self.weights, num_rows = prepare(model, dtype), state.batch_size
        sizes = self.weights.sizes
        self.rows = DecodingRows(model, sizes, num_rows, dtype)
        self.rows.enter(state)
        self._embed = model.embed
        self._x = as_numpy(torch.zeros(num_rows * sizes.model_dim))
        self._logits = torch.zeros(num_rows, len(model.output.output.weight))
        scratch = kernels.Scratch.make(num_rows, sizes)
        layers = zip(self.weights.layers, self.rows.layers, strict=True)
        self._common = num_rows, kernels.plain(sizes), self.weights.eps, self._x
        self._layers = [kernels.plain((weights, rows, scratch)) for weights, rows in layers]
        head = (self.weights.head, self.rows.norm, scratch.normed, scratch.ones, as_numpy(self._logits).reshape(-1))
        self._head = kernels.plain(head)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row.

        Args:
            tokens: (B,) int64, inside the vocabulary.

        Returns:
            logits (B, vocabulary) float32 of the next token, overwritten by the next step.
        """
        embed, threads = self._embed, num_threads()
        x = embed.weight.detach()[tokens].float().view(-1)
        self._x[:] = (x * math.sqrt(embed.embedding_dim) if embed.scaled else x).numpy()
        for layer in self._layers:
            kernels.layer(threads, *self._common, *layer)
        kernels.head(threads, *self._common, *self._head)
        self.rows.position += 1
        return self._logits

    def state(self) -> State:
        """A copy of the state, as the model takes it."""
        return self.rows.state()
