"""Where the next token of each row stands, as compiled steps need it; found once a token, for all layers."""

import numpy as np
import torch

from ..ops.cpu.decoding_parts import Places, Sizes
from ..ops.cpu.simd import as_numpy
from ..ops.rotary import rotations

_CPU = torch.device("cpu")


class DecodingPlaces:
    """Counts the tokens of each row, and finds how far their queries and keys turn.

    Where a token sees its own chunk alone, that is the angle of its place in it, out of a table. Where it sees more,
    it is that of its place in the document, computed in float64, however large.

    Args:
        sizes: of the model.
        rope_base: of the rotary frequencies.
        num_rows: slots.
    """

    def __init__(self, sizes: Sizes, rope_base: float, num_rows: int):
        self.chunk_size, width = sizes.chunk_size, sizes.z_head_dim
        self.position = np.zeros(num_rows, np.int64)
        self._frequency: np.ndarray | None = None
        if sizes.num_chunks == 1:
            table = rotations(sizes.chunk_size, width, rope_base, torch.float32, _CPU)
            self._cos, self._sin = (as_numpy(t) for t in table)
        else:
            self._frequency = rope_base ** (-np.arange(0, width, 2) / width)
            self._cos, self._sin = (np.zeros((num_rows, width // 2), np.float32) for _ in range(2))
        self._places = Places(self.position, self._cos.reshape(-1), self._sin.reshape(-1))

    def find(self) -> Places:
        """Those of the next tokens."""
        if self._frequency is not None:
            angle = self.position[:, None] * self._frequency
            np.cos(angle, out=self._cos, casting="same_kind")
            np.sin(angle, out=self._sin, casting="same_kind")
        return self._places
