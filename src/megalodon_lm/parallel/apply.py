"""Everything that is applied to the model of one device, in the order in which each wraps what is there.

Tensor parallelism gives layers their share of the weights, activation checkpointing is the decoder's own, compilation
takes the blocks as they then are, and sharding (FSDP2) comes last, since it must see the parameters that will train.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..model.decoder import Decoder
from ..model.language_model import LanguageModel
from ..ops.derived import forget
from ..state_spec import Sealed
from .tensor import apply_tensor_parallel


def parallelize(
    model: LanguageModel,
    mesh: DeviceMesh,
    compile_blocks: Callable[[LanguageModel], None] | None = None,
    precision: MixedPrecisionPolicy | None = None,
) -> None:
    """Share the weights of a model out over a mesh, in place; names of parameters stay.

    Chunk parallelism is no part of this: it is how the model is called, see ChunkParallel.

    Args:
        model: the same on every rank, or on the meta device.
        mesh: with the dimensions of mesh.DIMENSIONS.
        compile_blocks: compiles the blocks, if they are to be.
        precision: of FSDP2; that of the weights by default.
    """
    if mesh["tensor"].size() > 1:
        assert isinstance(model, Decoder)  # as all models that train are
        apply_tensor_parallel(model, mesh["tensor"])
    if compile_blocks is not None:
        compile_blocks(model)
    if mesh["shard"].size() > 1:
        shard(model, mesh, precision or MixedPrecisionPolicy())


def shard(model: Any, mesh: DeviceMesh, precision: MixedPrecisionPolicy) -> None:
    """Apply FSDP2 to each block and to the model.

    Weights are shared out over the ranks of `shard` and `chunk` together, which all have gradients of their own to add;
    over `replicate` they are repeated. Gradients are summed, not averaged: each rank's loss is its share of the whole.
    """
    owners = mesh["shard", "chunk"]._flatten("owner") if mesh["chunk"].size() > 1 else mesh["shard"]
    if mesh["replicate"].size() > 1:
        name = "owner" if mesh["chunk"].size() > 1 else "shard"
        owners = mesh["replicate", name]
    # With parts of sequences to wait for, no rank may also wait for weights in mid-backward: they stay until then.
    reshard = mesh["chunk"].size() == 1
    for part in (*model.layers, model):
        fully_shard(part, mesh=owners, mp_policy=precision, reshard_after_forward=reshard)
        if part is not model:
            part.register_forward_hook(_seal, prepend=True)
            part.register_forward_hook(_open)
        part.register_forward_pre_hook(_forget_weights)
        part.register_forward_hook(_give_back_weights)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no sum that divides


def _seal(part: nn.Module, given: Any, made: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hide a block's exit state from FSDP2, which gathers its weights at the first gradient of what it sees.

    A tensor that a block hands through has its gradient before all others, on the ranks whose rows have one.
    """
    return (*made[:-1], Sealed(made[-1]))


def _open(part: nn.Module, given: Any, made: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*made[:-1], made[-1].tree)


def _forget_weights(part: nn.Module, given: Any) -> None:
    """What was made of gathered weights when they had other values: they are written again uncounted."""
    forget(p._local_tensor if isinstance(p, DTensor) else p for p in part.parameters())


def _give_back_weights(part: nn.Module, given: Any, made: Any) -> None:
    """Without a backward pass to follow, which would do so: others may have changed when they are needed again."""
    if not torch.is_grad_enabled() and isinstance(part, FSDPModule):
        part.reshard()


def sum_gradients(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Add up the gradients of all ranks that hold the same weights; what FSDP2 shares out, it has summed already."""
    if mesh["shard"].size() > 1:
        return
    gradients = [_share(p.grad) for _, p in model.named_parameters() if p.grad is not None]
    for dimension in ("replicate", "chunk"):
        if mesh[dimension].size() > 1 and gradients:
            _sum(gradients, mesh[dimension].get_group())


def _share(gradient: torch.Tensor) -> torch.Tensor:
    """What this rank has of it, in the same memory: other ranks of `tensor` add up the rest."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _sum(tensors: list[torch.Tensor], group: Any) -> None:
    """One message for each type."""
    for dtype in {t.dtype for t in tensors}:
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in same])
        torch.distributed.all_reduce(flat, group=group)
        for t, total in zip(same, flat.split([t.numel() for t in same]), strict=True):
            t.copy_(total.view_as(t))
