"""A block of Megalodon that reads on the CPU: one compiled call, where its products are made in squares."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import block as portable
from ..backend import implements
from ..block import BlockSizes, BlockWeights
from ..cema import cema_coefficients
from ..chunk_attention import KeyValueCache
from ..derived import derived
from ..linear import Layer
from ..norms import head_maps
from ..timestep_norm import NormState
from . import block_kernels as kernels
from . import squares, squares_linear
from .cema import fill_up, pack
from .finite import EXPONENTS
from .norms import affine, scale_alone
from .open_chunk import zeros
from .rotary import angle_tables
from .simd import as_numpy
from .squares import SQUARE
from .team import num_threads
from .timestep_norm_kernels import CUMULATIVE

FEW = 8  # tokens that the ops of a block take faster one by one
KEPT_BYTES = 1 << 27  # of scratch, most that stays after a call

_KIND = {torch.bfloat16: np.uint16, torch.float32: np.float32}
_EXPONENTS = {dtype: tuple(map(np.uint64, EXPONENTS[dtype.itemsize])) for dtype in _KIND}

_free: list[tuple[Any, Any]] = []  # scratch of the last call, and what it is for, while no other call uses it


def _fits(
    x: Tensor, weights: BlockWeights, sizes: BlockSizes, state: Any = None, out_dtype: torch.dtype | None = None
) -> bool:
    """A stream of float32, products in squares, and more tokens than a few."""
    if x.dtype != torch.float32 or x.shape[1] <= FEW or squares.available(out_dtype or x.dtype) is None:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.numel():
        return False
    together, heads = _together(weights), (sizes.z_head_dim, sizes.value_head_dim)
    if any(len({bias is None for _, bias in layers}) > 1 for layers in together):
        return False
    return not any(n % SQUARE for n in (*heads, *(n for layers in together for w, _ in layers for n in w.shape)))


@implements(portable.read_block, "cpu", _fits)
def read_block(
    x: Tensor,
    weights: BlockWeights,
    sizes: BlockSizes,
    state: dict[str, Any] | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """As megalodon_lm.ops.block.read_block; sums of products are rounded after what follows them."""
    w, s, dtype = weights, sizes, out_dtype or x.dtype
    timenorm, average, rmsnorm, heads_maps, norm = derived(
        _prepare, *w.timenorm, *w.cema, w.rmsnorm, *w.heads, *w.norm, arguments=(s.z_head_dim,)
    )
    mixed, values, back, opening, closing = (squares_linear.pack_layers(layers, dtype)[:3] for layers in _together(w))
    tables = [t.reshape(-1) for t in angle_tables(s.chunk_size, s.z_head_dim, s.rope_base)[:2]]
    prepared = (timenorm, average, rmsnorm, heads_maps, mixed, values, back, norm, opening, closing, tuple(tables))

    batch, length, dim = x.shape
    ndim, heads = w.cema[0].shape[1], len(w.wz[0]) // s.z_head_dim
    widths = heads, s.z_head_dim, s.value_head_dim
    turning = heads - s.heads_without_rope
    shape = kernels.Shape(batch, length, dim, s.num_groups, ndim, *widths, len(w.fc1[0]), s.chunk_size, turning)
    entry, count, fill = _enter(state, shape, dtype)
    mean, var = (torch.empty(batch, s.num_groups, dtype=torch.float64) for _ in range(2))
    states, out = x.new_empty(batch, dim, ndim, 2), x.new_empty(x.shape)
    counted, left = count + length, (fill + length) % s.chunk_size
    used = int(left.sum())
    k, v = (zeros((batch, s.chunk_size, heads, d), dtype, used) for d in widths[1:])
    leaving = (*_flat(counted, mean, var, states), as_numpy(k), as_numpy(v), as_numpy(left))
    wanted = shape, entry[4].shape[1], _KIND[dtype]
    scratch = _borrow(*wanted)
    given = (*_flat(x), prepared, entry, leaving, scratch, *_flat(out))
    choices = tuple(shape), s.eps, CUMULATIVE, _EXPONENTS[dtype], s.two_hop
    finite = kernels.read(num_threads(), squares.available(dtype), *choices, *given)
    if sum(t.nbytes for t in scratch) <= KEPT_BYTES:
        _free[:] = [(wanted, scratch)]
    if not finite:
        return portable.read_block.portable(x, weights, sizes, state, out_dtype)
    return out, {
        "norm": NormState(counted, mean, var),
        "cema": states,
        "attention": KeyValueCache(k, v, left),
    }


def _borrow(*wanted: Any) -> tuple[np.ndarray, ...]:
    """kernels.Scratch, that of the last call where it fits: layers are alike, and new memory costs page faults."""
    try:
        made_for, scratch = _free.pop()
    except IndexError:
        made_for = None
    return scratch if made_for == wanted else tuple(kernels.Scratch.make(*wanted))


def _enter(
    state: dict[str, Any] | None, shape: kernels.Shape, dtype: torch.dtype
) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """What kernels.Carried holds, and of it the count and the fill as tensors."""
    batch, _, dim, groups, ndim, heads, *widths = shape[:8]
    if state is None:
        count, fill = (torch.zeros(batch, dtype=torch.int64) for _ in range(2))
        statistics = (np.zeros(batch * groups), np.zeros(batch * groups), np.zeros(batch * dim * ndim * 2, np.float32))
        cached = (np.zeros((batch, 0, heads, width), _KIND[dtype]) for width in widths)
        return (as_numpy(count), *statistics, *cached, as_numpy(fill)), count, fill
    count, mean, var = state["norm"]
    keys, values, fill = state["attention"]
    doubles = (as_numpy(t.double().contiguous()).reshape(-1) for t in (mean, var))
    cached = (as_numpy(t.to(dtype).contiguous()) for t in (keys, values))
    average = as_numpy(state["cema"].float().contiguous()).reshape(-1)
    return (as_numpy(count.contiguous()), *doubles, average, *cached, as_numpy(fill.contiguous())), count, fill


def _together(w: BlockWeights) -> tuple[tuple[Layer, ...], ...]:
    """Layers of one input each, in the order of kernels.Weights."""
    return (w.wz, w.wr, w.wh1), (w.wv,), (w.wh2,), (w.fc1,) if w.fc3 is None else (w.fc1, w.fc3), (w.fc2,)


def _prepare(*given: Any) -> tuple[Any, ...]:
    """What kernels.Weights holds besides layers, of timenorm, cema, rmsnorm, heads, norm, and the width of a head."""
    *tensors, width = given
    omega, coefficients = tensors[6], pack(*cema_coefficients(*tensors[2:6]))
    maps = head_maps(*tensors[8:10], width)
    return (
        _flat(*affine(*tensors[:2])),
        _flat(coefficients, fill_up(omega.flatten().to(coefficients.dtype))),
        _flat(*scale_alone(tensors[7])),
        _flat(*map(torch.stack, maps)),
        _flat(*affine(*tensors[10:])),
    )


def _flat(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(as_numpy(t.contiguous()).reshape(-1) for t in tensors)
