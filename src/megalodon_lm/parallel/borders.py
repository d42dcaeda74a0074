"""Where activations pass between what every tensor rank computes alike and what each computes of its part.

Between such borders all tensors are plain ones, as kernels need them. A tensor is *whole* where every rank has the same
one, *cut* where each has its share of the features, and *partial* where the ranks' tensors add up to the meant one. The
gradient of a whole tensor is whole where all ranks go on alike, and partial where each goes on with its own weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

Border = Callable[[Tensor, DeviceMesh], Tensor]


def split(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Whole to cut; the gradient, cut, is gathered."""
    return _pass(x, mesh, Replicate(), Shard(x.dim() - 1))


def take(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Whole to cut, of what other uses leave a partial gradient: this one's is zero outside the share."""
    width = x.shape[-1] // mesh.size()
    return x.narrow(-1, mesh.get_local_rank() * width, width)


def gather(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Cut to whole; the gradient is partial, and is added up where it is cut."""
    return _pass(x, mesh, Shard(x.dim() - 1), Replicate(), gradient=Partial())


def join(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Cut to whole; the gradient is whole, and is cut."""
    return _pass(x, mesh, Shard(x.dim() - 1), Replicate())


def spread(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Whole, and stays so; the gradient is partial, and is added up."""
    return _pass(x, mesh, Replicate(), Replicate(), gradient=Partial())


def add_up(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Partial to whole; the gradient is whole."""
    return _pass(x, mesh, Partial(), Replicate())


def join_uneven(x: Tensor, mesh: DeviceMesh, features: int) -> Tensor:
    """As join, where the shares of so many features are those of torch.chunk: as large but for the last."""
    whole = torch.empty(*x.shape[:-1], features, device="meta")
    there = DTensor.from_local(x, mesh, [Shard(x.dim() - 1)], run_check=False, shape=whole.shape, stride=whole.stride())
    return there.redistribute(placements=[Replicate()]).to_local()


def _pass(x: Tensor, mesh: DeviceMesh, have: Placement, want: Placement, gradient: Placement | None = None) -> Tensor:
    there = DTensor.from_local(x, mesh, [have], run_check=False).redistribute(placements=[want])
    return there.to_local(grad_placements=[gradient or want])
