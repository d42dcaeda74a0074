"""What steps of one token make of a model's weights: made once, shared by all streams, kept until a weight changes.

Each part is kept by itself, as ops.derived does it, so that reading and all steps share one copy of it. Weights in
another form, such as packed ones, are other forms of Matrix.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..layers.block import Block
from ..layers.chunk_attention import ChunkAttention
from ..layers.complex_ema import ComplexEMA
from ..layers.embedding import Embedding
from ..layers.feed_forward import FeedForward
from ..layers.gated_attention import GatedAttention
from ..layers.linear import Linear
from ..layers.norms import AffineNorm, LayerNorm, RMSNorm, TimestepNorm
from ..model.decoder import Head, Megalodon
from ..ops.cema import cema_coefficients
from ..ops.cpu.decoding_kernels import Affine, Average, Heads, HeadWeights, LayerWeights, Sizes
from ..ops.cpu.matrix_vector import Matrix
from ..ops.cpu.simd import LANES, as_numpy
from ..ops.derived import derived, rounded
from ..ops.rotary import rotations

_BLOCK = {
    "": Block,
    "mega": GatedAttention, "mega.timenorm": TimestepNorm, "mega.cema": ComplexEMA, "mega.rmsnorm": RMSNorm,
    "mega.attention": ChunkAttention,
    "mega.wv": Linear, "mega.wz": Linear, "mega.wr": Linear, "mega.wh1": Linear, "mega.wh2": Linear,
    "nffn": FeedForward, "nffn.norm": LayerNorm, "nffn.fc1": Linear, "nffn.fc2": Linear,
}  # fmt: skip
_BLOCKS = (_BLOCK, _BLOCK | {"nffn.fc3": Linear})
_HEAD = {"": Head, "final_norm": TimestepNorm, "output": Linear}
_CHOICES = ("timestep_norm", "attention", "heads_without_rope", "memory", "residual", "cema", "cema_omega",
            "attention_norm", "normalize_attention")  # fmt: skip
_CPU = torch.device("cpu")


class DecodingWeights(NamedTuple):
    """Weights of a model, prepared for steps of one token."""

    sizes: Sizes
    eps: float
    """Of all norms."""
    layers: list[LayerWeights]
    head: HeadWeights


def fits(model: Megalodon) -> bool:
    """Whether compiled steps can run a model.

    It is made of the very parts that they know, those of a Megalodon, all blocks of the same widths, these multiples of
    16, and without dropout; its weights are float32 or bf16 on the CPU.
    """
    parts = list(model.modules())
    dropped = model.training and any(getattr(part, name, 0) for part in parts for name in ("dropout", "hidden_dropout"))
    plain = all(p.device.type == "cpu" and p.dtype in (torch.float32, torch.bfloat16) for p in model.parameters())
    usual = all(getattr(model.config, name) == getattr(ModelConfig(), name) for name in _CHOICES)
    known = usual and type(model.embed) is Embedding and _kinds(model.output) == _HEAD
    blocks: list[Any] = list(model.layers)
    if dropped or not plain or not known or not all(_kinds(block) in _BLOCKS for block in blocks):
        return False
    sizes = _sizes(blocks[0])
    widths = (sizes.model_dim, sizes.hidden_dim, sizes.z_head_dim, sizes.value_head_dim)
    alike = (
        {_sizes(block) for block in blocks},
        {block.mega.attention.rope_base for block in blocks},
        {part.group_dim for part in parts if isinstance(part, TimestepNorm)},
        {part.eps for part in parts if hasattr(part, "eps")},
    )
    return all(width % LANES == 0 for width in widths) and all(len(values) == 1 for values in alike)


def _kinds(module: nn.Module) -> dict[str, type]:
    return {name: type(part) for name, part in module.named_modules()}


@torch.no_grad()
def prepare(model: Megalodon, dtype: torch.dtype) -> DecodingWeights:
    """The weights of a model that `fits`.

    Args:
        model: later changes of its weights may or may not show in what was made.
        dtype: of the weights in products, float32 or bf16.
    """
    first: Any = model.layers[0]
    sizes, attention = _sizes(first), first.mega.attention
    table = rotations(sizes.chunk_size, sizes.z_head_dim, attention.rope_base, torch.float32, _CPU)
    cos, sin = (_flat(t) for t in table)
    layers = [_layer(block, sizes, dtype, cos, sin) for block in model.layers]
    head = HeadWeights(_affine(model.output.final_norm), _matrix(model.output.output, dtype))
    return DecodingWeights(sizes, model.output.final_norm.eps, layers, head)


def _sizes(block: Any) -> Sizes:
    mega, hidden_dim = block.mega, len(block.nffn.fc1.weight)
    dim, ndim, _ = mega.cema.gamma.shape
    return Sizes(
        model_dim=dim,
        num_groups=dim // mega.timenorm.group_dim,
        cema_ndim=ndim + -ndim % LANES,
        num_heads=len(mega.wz.weight) // mega.z_head_dim,
        z_head_dim=mega.z_head_dim,
        value_head_dim=mega.value_head_dim,
        hidden_dim=hidden_dim,
        chunk_size=mega.attention.chunk_size,
    )


def _layer(block: Any, sizes: Sizes, dtype: torch.dtype, cos: np.ndarray, sin: np.ndarray) -> LayerWeights:
    mega, ffn = block.mega, block.nffn
    cema, width = mega.cema, sizes.model_dim
    fc1 = _matrix(ffn.fc1, dtype)
    scale = derived(_head_scale, mega.gamma, arguments=(sizes.z_head_dim,))
    p, q, g = derived(_coefficients, cema.alpha, cema.delta, cema.theta, cema.gamma)
    return LayerWeights(
        timenorm=_affine(mega.timenorm),
        cema=Average(_flat(p), _flat(q), _flat(g), _vector(cema.omega)),
        rmsnorm=Affine(as_numpy(derived(_scale, mega.rmsnorm.weight)), as_numpy(torch.zeros(width))),
        wv=_matrix(mega.wv, dtype),
        wz=_matrix(mega.wz, dtype),
        wr=_matrix(mega.wr, dtype),
        wh1=_matrix(mega.wh1, dtype),
        wh2=_matrix(mega.wh2, dtype),
        heads=Heads(_flat(scale), _vector(mega.beta), cos, sin),
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


def _vector(t: Tensor) -> np.ndarray:
    return _flat(rounded(t, torch.float32).contiguous())


def _flat(t: Tensor) -> np.ndarray:
    return as_numpy(t).reshape(-1)


def _scale(weight: Tensor) -> Tensor:
    """1 + 0.003 would be 1 in bf16."""
    return weight.float() + 1


def _head_scale(gamma: Tensor, width: int) -> Tensor:
    return (gamma.float() + 1) / math.sqrt(width)


def _coefficients(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
    """p, q and g of CEMA as the kernel takes them; see Average."""
    p, q, g = cema_coefficients(alpha, delta, theta, gamma)
    return tuple(_pad(t).contiguous() for t in (p, *(torch.view_as_real(t).transpose(1, 2) for t in (q, g))))


def _pad(t: Tensor) -> Tensor:
    """The last dimension filled with zeros up to a multiple of LANES."""
    return F.pad(t, (0, -t.shape[-1] % LANES))
