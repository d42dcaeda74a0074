"""One token at a time on the CPU: each layer is one compiled call, and nothing is allocated from step to step."""

import math
from typing import Any

import torch
from torch import Tensor

from ..model.megalodon import Megalodon
from ..ops.cpu import decoding_kernels as kernels
from ..ops.cpu.decoding_parts import Scratch, plain
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
        weights, sizes = self.weights, self.weights.sizes
        self.rows = DecodingRows(model, sizes, num_rows, dtype)
        self.rows.enter(state)
        self._embed = model.embed
        self._x = as_numpy(torch.zeros(num_rows * sizes.model_dim))
        self._logits = torch.zeros(num_rows, len(model.output.output.weight))
        scratch = Scratch.make(num_rows, sizes)
        self._common = num_rows, plain(sizes), plain(weights.choices), self._x
        layers: list[tuple[Any, ...]] = [
            (*parts, scratch) for parts in zip(weights.layers, self.rows.layers, strict=True)
        ]
        self._layer: Any = kernels.layer
        if self.rows.memories:
            memories = zip(weights.maps, self.rows.memories, strict=True)
            self._layer = kernels.layer_with_memory
            layers = [(*parts, *memory) for parts, memory in zip(layers, memories, strict=True)]
        self._layers = [plain(parts) for parts in layers]
        head = (weights.head, self.rows.norm, scratch, as_numpy(self._logits).reshape(-1))
        self._head = plain(head)

    @torch.no_grad()  # what memories absorb
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
        places = tuple(self.rows.places.find())
        for layer in self._layers:
            self._layer(threads, *self._common, places, *layer)
        kernels.head(threads, *self._common, *self._head)
        self.rows.advance()
        return self._logits

    def state(self) -> State:
        """A copy of the state, as the model takes it."""
        return self.rows.state()
