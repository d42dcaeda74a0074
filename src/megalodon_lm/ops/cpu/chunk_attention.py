"""Chunk attention on the CPU: the same function as the portable one, out of operators of compiled code."""

from torch import Tensor

from .. import chunk_attention as portable
from ..backend import implements
from ..boundaries import Boundaries
from ..chunk_attention import KeyValueCache
from ..windowed_attention import Window
from .windowed_attention import fits, windowed_attention


@implements(portable.chunk_attention, "cpu", fits)
def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    rope_base: float,
    cache: KeyValueCache | None = None,
    boundaries: Boundaries | None = None,
    dropout: float = 0.0,
    drop_keys: bool = False,
    heads_without_rope: int = 0,
) -> tuple[Tensor, KeyValueCache]:
    """As megalodon_lm.ops.chunk_attention.chunk_attention; for q, k and v of one type, without dropout."""
    window = Window(chunk_size)
    out, *leaving = windowed_attention(q, k, v, window, rope_base, cache, boundaries, heads_without_rope)
    return out, KeyValueCache(*leaving)
