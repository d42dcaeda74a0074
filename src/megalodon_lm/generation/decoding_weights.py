"""What steps of one token make of a model's weights: made once, shared by all streams, kept until a weight changes.

Each part is kept by itself, as ops.derived does it, so that reading and all steps share one copy of it. Weights in
another form, such as packed ones, are other forms of Matrix.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.complex_ema import ComplexEMA
from ..layers.linear import Linear
from ..layers.norms import AffineNorm, DecayNorm, NormOverTime
from ..layers.sliding_attention import SlidingAttention
from ..model.megalodon import Megalodon
from ..ops.cema import cema_coefficients, ema_coefficients
from ..ops.cpu.decoding_parts import Affine, Average, Choices, Heads, HeadWeights, LayerWeights, Sizes
from ..ops.cpu.matrix_vector import Matrix
from ..ops.cpu.simd import LANES, as_numpy
from ..ops.cpu.timestep_norm_kernels import CUMULATIVE
from ..ops.decay_norm import MEAN_DECAY, VAR_DECAY
from ..ops.derived import derived, rounded


class DecodingWeights(NamedTuple):
    """Weights of a model, prepared for steps of one token."""

    sizes: Sizes
    choices: Choices
    layers: list[LayerWeights]
    maps: list[Heads]
    """Of the memories' queries and keys, where the model has memories."""
    head: HeadWeights


@torch.no_grad()
def prepare(model: Megalodon, dtype: torch.dtype) -> DecodingWeights:
    """The weights of a model that decodable.fits.

    Args:
        model: later changes of its weights may or may not show in what was made.
        dtype: of the weights in products, float32 or bf16.
    """
    norm: Any = model.output.final_norm
    first = model.layers[0]
    layers = [_layer(block, dtype) for block in model.layers]
    mixers: list[Any] = [block.mega for block in model.layers]
    maps = [_maps(mixer, 2) for mixer in mixers if mixer.memory is not None]
    head = HeadWeights(_affine(norm), _matrix(model.output.output, dtype))
    return DecodingWeights(sizes_of(first, norm), choices_of(first, norm), layers, maps, head)


def sizes_of(block: Any, norm: NormOverTime) -> Sizes:
    """The widths of a block, in a model with this final norm."""
    mega, dim = block.mega, len(norm.weight)
    ndim = 0 if mega.cema is None else mega.cema.gamma.shape[1]
    return Sizes(
        model_dim=dim,
        num_groups=dim // norm.group_dim,
        cema_ndim=ndim + -ndim % LANES,
        num_heads=len(mega.wz.weight) // mega.z_head_dim,
        z_head_dim=mega.z_head_dim,
        value_head_dim=mega.value_head_dim,
        hidden_dim=len(block.nffn.fc1.weight),
        chunk_size=mega.attention.chunk_size,
        num_chunks=2 if isinstance(mega.attention, SlidingAttention) else 1,
    )


def choices_of(block: Any, norm: NormOverTime) -> Choices:
    """What else a block, in a model with this final norm, does."""
    mega = block.mega
    return Choices(
        eps=norm.eps,
        decays=(MEAN_DECAY, VAR_DECAY) if isinstance(norm, DecayNorm) else CUMULATIVE,
        over_time=isinstance(mega.timenorm, NormOverTime),
        normalized=mega.normalized,
        rotary_heads=len(mega.wz.weight) // mega.z_head_dim - mega.attention.heads_without_rope,
        two_hop=block.two_hop,
    )


def _layer(block: Any, dtype: torch.dtype) -> LayerWeights:
    mega, ffn = block.mega, block.nffn
    width = len(mega.rmsnorm.weight)
    fc1 = _matrix(ffn.fc1, dtype)
    return LayerWeights(
        timenorm=_affine(mega.timenorm),
        cema=_no_average(width) if mega.cema is None else _average(mega.cema),
        rmsnorm=Affine(as_numpy(derived(_scale, mega.rmsnorm.weight)), as_numpy(torch.zeros(width))),
        wv=_matrix(mega.wv, dtype),
        wz=_matrix(mega.wz, dtype),
        wr=_matrix(mega.wr, dtype),
        wh1=_matrix(mega.wh1, dtype),
        wh2=_matrix(mega.wh2, dtype),
        heads=_maps(mega, 0),
        ffn_norm=_affine(ffn.norm),
        fc1=fc1,
        fc3=Matrix(fc1.weight, fc1.bias[:0]) if ffn.fc3 is None else _matrix(ffn.fc3, dtype),
        fc2=_matrix(ffn.fc2, dtype),
        alpha=as_numpy(torch.ones(width)) if ffn.alpha is None else _vector(ffn.alpha),
    )


def _matrix(linear: Linear, dtype: torch.dtype) -> Matrix:
    weight = _flat(rounded(linear.weight, dtype).contiguous())
    bias = as_numpy(torch.zeros(len(linear.weight))) if linear.bias is None else _vector(linear.bias)
    return Matrix(weight, bias)


def _affine(norm: AffineNorm) -> Affine:
    return Affine(as_numpy(derived(_scale, norm.weight)), _vector(norm.bias))


def _maps(mixer: Any, first: int) -> Heads:
    """Of the mixer's view number `first` and the next one."""
    scale = as_numpy(derived(_head_scale, mixer.gamma, arguments=(mixer.z_head_dim,)))
    shift = _vector(mixer.beta).reshape(scale.shape)
    return Heads(*(t[first : first + 2].reshape(-1) for t in (scale, shift)))


def _average(cema: ComplexEMA) -> Average:
    scaled = (cema.omega is not None,)
    if cema.theta is None:
        p, q, g = derived(_real, cema.alpha, cema.delta, cema.gamma, arguments=scaled)
    else:
        p, q, g = derived(_complex, cema.alpha, cema.delta, cema.theta, cema.gamma, arguments=scaled)
    omega = as_numpy(torch.ones(len(p))) if cema.omega is None else _vector(cema.omega)
    return Average(_flat(p), _flat(q), _flat(g), omega)


def _no_average(dim: int) -> Average:
    nothing = as_numpy(torch.zeros(0))
    return Average(nothing, nothing, nothing, as_numpy(torch.ones(dim)))


def _vector(t: Tensor) -> np.ndarray:
    return _flat(rounded(t, torch.float32).contiguous())


def _flat(t: Tensor) -> np.ndarray:
    return as_numpy(t).reshape(-1)


def _scale(weight: Tensor) -> Tensor:
    """1 + 0.003 would be 1 in bf16."""
    return weight.float() + 1


def _head_scale(gamma: Tensor, width: int) -> Tensor:
    return (gamma.float() + 1) / math.sqrt(width)


def _complex(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, scaled: bool) -> tuple[Tensor, ...]:
    return _laid_out(*cema_coefficients(alpha, delta, theta, gamma, scaled))


def _real(alpha: Tensor, delta: Tensor, gamma: Tensor, scaled: bool) -> tuple[Tensor, ...]:
    return _laid_out(*ema_coefficients(alpha, delta, gamma, scaled))


def _laid_out(p: Tensor, q: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """The coefficients of CEMA as the kernel takes them; see Average."""
    return tuple(_pad(t).contiguous() for t in (p, *(torch.view_as_real(t).transpose(1, 2) for t in (q, g))))


def _pad(t: Tensor) -> Tensor:
    """The last dimension filled with zeros up to a multiple of LANES."""
    return F.pad(t, (0, -t.shape[-1] % LANES))
