"""What steps of one token are made of: weights of the model, states of the rows, and memory of no meaning.

All arrays are flat for kernels, rows first; they may have room for more rows than take the step. Named tuples take
Numba three times as long to let in as plain ones, so they come as `plain` makes them, and get their names back inside,
where these cost nothing.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from .decoding_attention import SPLIT
from .matrix_vector import Matrix
from .simd import as_numpy


def plain(part: Any) -> Any:
    """Arrays and numbers in named tuples, as `layer` and `head` take them."""
    return tuple(map(plain, part)) if isinstance(part, tuple) else part


class Sizes(NamedTuple):
    """Widths of a model."""

    model_dim: int
    num_groups: int
    cema_ndim: int
    """States of a channel, filled up to a multiple of 16."""
    num_heads: int
    z_head_dim: int
    value_head_dim: int
    hidden_dim: int
    """Of the feed-forward network."""
    chunk_size: int
    num_chunks: int
    """Of which keys and values are held: the one that a token stands in, and the one before if it sees that."""


class Choices(NamedTuple):
    """What else differs from model to model."""

    eps: float
    """Of all norms."""
    decays: tuple[float, float]
    """Of the norms over time; see timestep_norm_kernels."""
    over_time: bool
    """Whether the norm at the entry of a block is one; else it is a layer norm."""
    normalized: bool
    """Whether z is divided by its root mean square."""
    rotary_heads: int
    """The first ones; queries and keys of the others do not turn."""
    two_hop: bool
    """Whether the feed-forward network adds to the input of the block, and not to its own."""


class Affine(NamedTuple):
    """What a norm multiplies by, its 1 added, and what it adds: (D,) float32."""

    scale: np.ndarray
    shift: np.ndarray


class Average(NamedTuple):
    """CEMA: p (D, N), q and g (D, 2, N), all real parts of a channel before the imaginary ones, and omega (D,).

    The real average has imaginary parts of 0, that without omega has ones, and none at all has no states besides.
    """

    p: np.ndarray
    q: np.ndarray
    g: np.ndarray
    omega: np.ndarray


class Heads(NamedTuple):
    """Maps (2, Z) from normalised z to queries and keys, those of attention or of the memory."""

    scale: np.ndarray
    shift: np.ndarray


class LayerWeights(NamedTuple):
    """Weights of one block, prepared; named as in its modules."""

    timenorm: Affine
    cema: Average
    rmsnorm: Affine
    wv: Matrix
    wz: Matrix
    wr: Matrix
    wh1: Matrix
    wh2: Matrix
    heads: Heads
    ffn_norm: Affine
    fc1: Matrix
    fc3: Matrix
    """Without a bias where there is no gate."""
    fc2: Matrix
    alpha: np.ndarray
    """(D,) that the feed-forward network is multiplied by."""


class HeadWeights(NamedTuple):
    """Weights of the final norm and of the map to the vocabulary."""

    final_norm: Affine
    output: Matrix


class Statistics(NamedTuple):
    """Of a norm over time: count (B,) int64, mean and variance (B, G) float64; for kernels the memory of them."""

    count: Any
    mean: Any
    var: Any


class LayerRows(NamedTuple):
    """What one block carries for each row: cema (B, D, 2, N) float32, keys and values (B, chunks, c, H, d).

    For kernels the memory of them.
    """

    norm: Statistics
    cema: Any
    keys: Any
    values: Any


class MemoryRows(NamedTuple):
    """Of the adaptive memory: keys (B, c, H, dk) of the unfinished chunk, memory (B, chunks, H, dk, dv) float32.

    What attention does not see is in the memory: it is read as many chunks late as keys are held.
    """

    keys: Any
    memory: Any


class Places(NamedTuple):
    """Where the next token of each row stands, and how far queries and keys turn there; all layers share it.

    position: (B,) int64, tokens of the document before it.
    cos, sin: float32; where a token sees its own chunk alone (c, Z / H / 2), for each place in it; else
        (B, Z / H / 2), for each row.
    """

    position: np.ndarray
    cos: np.ndarray
    sin: np.ndarray


class Scratch(NamedTuple):
    """Memory for one step of B rows, of no meaning before or after it."""

    normed: np.ndarray
    mixed: np.ndarray
    v: np.ndarray
    z: np.ndarray
    gate: np.ndarray
    skip: np.ndarray
    queries: np.ndarray
    scores: np.ndarray
    summary: np.ndarray
    partial: np.ndarray
    attention: np.ndarray
    y: np.ndarray
    hidden: np.ndarray
    hidden_gated: np.ndarray
    saved: np.ndarray
    """Where norms leave what a backward pass would need."""
    moments: np.ndarray
    """The same of norms over time: (B, 3, G) float64."""
    ones: np.ndarray
    """(B,) int64, tokens of each row in this step."""
    nowhere: np.ndarray
    """Empty: no document begins."""

    @classmethod
    def make(cls, rows: int, sizes: Sizes) -> "Scratch":
        """For so many rows."""
        d, f = sizes.model_dim, sizes.hidden_dim
        z, v = sizes.num_heads * sizes.z_head_dim, sizes.num_heads * sizes.value_head_dim
        splits = sizes.num_chunks * -(-sizes.chunk_size // SPLIT)
        tasks = sizes.num_heads * splits
        widths = (d, d, v, z, v, d, z, tasks * SPLIT, tasks * 2, v * splits, v, d, f, f)
        arrays = (as_numpy(torch.zeros(rows * width)) for width in (*widths, 2))  # PyTorch's begin at a cache line
        moments = np.zeros(rows * 3 * sizes.num_groups)
        return cls(*arrays, moments, np.ones(rows, np.int64), np.zeros(0, np.bool_))
