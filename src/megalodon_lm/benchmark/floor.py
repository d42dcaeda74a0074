"""The machine's floor: the least time in which it could do our work, measured.

Training and reading a prompt are bounded by matrix products, writing by the bytes of the weights, CEMA by the bytes of
its operands. The products run at the model's own shapes in the model's precision, nothing else with them.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ModelConfig

BUFFER_BYTES = 1 << 29  # far above any cache
ROWS = 4096  # of the products that are timed; longer sequences take as many times longer


class Product(NamedTuple):
    """`batch` matrix products (m, k) x (k, n), done `times` times, of which `share` of the work is needed."""

    batch: int
    m: int
    k: int
    n: int
    times: int
    share: float = 1.0

    @property
    def flops(self) -> float:
        """Needed operations, a multiply and an add as two."""
        return 2.0 * self.batch * self.m * self.k * self.n * self.times * self.share


def forward_products(config: ModelConfig, rows: int, length: int) -> list[Product]:
    """The matrix products of a forward pass; attention counts the pairs of tokens that see each other.

    Args:
        config: of the model.
        rows: tokens in all.
        length: of each sequence.
    """
    d, z, v, f = config.model_dim, config.z_dim, config.value_dim, config.ffn_hidden_dim
    layers, heads = config.num_layers, config.num_heads
    chunk = min(config.chunk_size, length)
    chunks = max(1, rows // chunk)
    dk, dv = z // heads, v // heads
    seen = (chunk + 1) / (2 * chunk)
    later = max(0.0, 1 - chunk / length)  # of the chunks: those with one before them
    attended = [seen, later] if config.attention == "sliding" else [seen]
    memory = []
    if config.memory == "adaptive":
        lag = 2 if config.attention == "sliding" else 1
        memory = [
            Product(chunks * heads, chunk, dk, dv, layers, max(0.0, 1 - lag * chunk / length)),  # read
            Product(chunks * heads, dk, chunk, dv, layers),  # two sums over a chunk,
            Product(chunks * heads, dk, chunk, dk, layers),
            Product(chunks * heads, dk, dk, dv, layers, later),  # and one product with the matrix of those before it
        ]
    return [
        Product(1, rows, d, z, layers if config.mixer == "cema" else 2 * layers),
        Product(1, rows, d, v, 2 * layers),
        *([Product(1, rows, d, d, layers)] if config.mixer == "cema" else []),
        Product(1, rows, v, d, layers),
        Product(1, rows, d, f, (2 if config.swiglu else 1) * layers),
        Product(1, rows, f, d, layers),
        *(Product(chunks * heads, chunk, dk, chunk, layers, share) for share in attended),
        *(Product(chunks * heads, chunk, chunk, dv, layers, share) for share in attended),
        *memory,
        Product(1, rows, d, config.vocab_size, 1),
    ]


class MatrixProducts:
    """Timer of all matrix products of a forward pass, and with `backward` of the two more that each has there.

    Args:
        config: of the model.
        batch: rows of tokens.
        length: of each row.
        dtype: of the operands.
        backward: the gradient of each operand besides.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype, backward: bool):
        tokens = batch * length
        rows = min(tokens, max(ROWS, config.chunk_size))
        self.products = forward_products(config, rows, length)
        self.scale = tokens / rows
        self.backward = backward
        self.flops = sum(p.flops for p in self.products) * (3 if backward else 1) * self.scale
        self.operands = [
            (torch.randn(p.batch, p.m, p.k, dtype=dtype), torch.randn(p.batch, p.k, p.n, dtype=dtype))
            for p in self.products
        ]
        self.outputs = [torch.empty(p.batch, p.m, p.n, dtype=dtype) for p in self.products]

    def __call__(self) -> float:
        """Run them and return the seconds they would take for all tokens."""
        seconds = 0.0
        for product, (a, b), out in zip(self.products, self.operands, self.outputs, strict=True):
            began = time.perf_counter()
            for _ in range(product.times):
                multiply(a, b, out)
                if self.backward:  # the output stands for its gradient, which has its shape
                    multiply(out, b.mT)
                    multiply(a.mT, out)
            seconds += (time.perf_counter() - began) * product.share
        return seconds * self.scale

    def describe(self, seconds: float) -> str:
        """What a run of so many seconds means."""
        return f"matrix products {self.flops / seconds / 1e9:,.0f} GFLOP/s"


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """(batch, m, k) x (batch, k, n); a batch of one goes the faster way of a plain product."""
    if len(a) > 1:
        return torch.bmm(a, b, out=out)
    return torch.mm(a[0], b[0], out=None if out is None else out[0])


class MemoryRead:
    """Timer of reading so many bytes from memory, by summing a buffer far larger than the caches on all threads."""

    def __init__(self, num_bytes: float):
        self.num_bytes = num_bytes
        self.buffer = torch.ones(BUFFER_BYTES // 4)

    def __call__(self) -> float:
        """Read the buffer and return the seconds that `num_bytes` would take."""
        began = time.perf_counter()
        self.buffer.sum()
        return (time.perf_counter() - began) * self.num_bytes / self.buffer.nbytes

    def describe(self, seconds: float) -> str:
        """What a run of so many seconds means."""
        return f"reads {self.num_bytes / seconds / 1e9:.1f} GB/s"


class MemoryCopy:
    """Timer of moving so many bytes, read and written ones together, by copying a buffer far larger than the caches."""

    def __init__(self, num_bytes: float):
        self.num_bytes = num_bytes
        self.source = torch.ones(BUFFER_BYTES // 4)
        self.target = torch.empty_like(self.source)

    def __call__(self) -> float:
        """Copy the buffer and return the seconds that `num_bytes` would take."""
        began = time.perf_counter()
        self.target.copy_(self.source)
        return (time.perf_counter() - began) * self.num_bytes / (2 * self.source.nbytes)

    def describe(self, seconds: float) -> str:
        """What a run of so many seconds means."""
        return f"copies {self.num_bytes / seconds / 1e9:.1f} GB/s, read and written"


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights that one decoded token reads: all but the rows of the embedding it does not take."""
    unread = 0 if config.share_emb else config.vocab_size * config.model_dim
    return (config.num_parameters - unread) * dtype.itemsize


def floor_timer(
    measure: str, config: ModelConfig, batch: int, length: int, tokens: int, dtype: torch.dtype
) -> "MatrixProducts | MemoryRead | MemoryCopy":
    """The floor of a measure.

    Args:
        measure: training, prefill, decode or cema.
        config: of the model.
        batch, length: of the tokens read.
        tokens: written, in decode.
        dtype: of matrix products and of weights that are read.
    """
    if measure in ("training", "prefill"):
        return MatrixProducts(config, batch, length, dtype, measure == "training")
    if measure == "decode":
        return MemoryRead(tokens * weight_bytes(config, dtype))
    assert measure == "cema"
    operands = 5  # forward reads x and writes y; backward reads x and the gradient of y and writes that of x
    return MemoryCopy(operands * batch * length * config.model_dim * 4)
