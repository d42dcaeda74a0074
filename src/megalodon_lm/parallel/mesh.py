"""The mesh of ranks: which of them share rows, weights, the length of a sequence, and the width of layers."""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import InputError

Exchange = Literal["chain", "parallel"]
DIMENSIONS = ("replicate", "shard", "chunk", "tensor")
"""Of the mesh, neighbours last: those that exchange most are nearest to each other."""


@dataclass(frozen=True)
class MeshSizes:
    """How many ranks a run has in each dimension; one of them may be 0, for as many as there are."""

    replicate: int = 0
    """Ranks with the same weights and other rows."""
    shard: int = 1
    """Ranks that share the weights out (FSDP2) and have other rows."""
    chunk: int = 1
    """Ranks that share the length of each sequence out."""
    tensor: int = 1
    """Ranks that share the heads and channels of each layer out."""
    exchange: Exchange = "chain"
    """How states go from rank to rank along a sequence: chain, from each to the next, or parallel, all at once where
    the layer allows it."""

    def check(self) -> None:
        """Refuse what is no mesh.

        Raises:
            InputError: naming the key and the rule.
        """
        sizes = {name: getattr(self, name) for name in DIMENSIONS}
        for name, size in sizes.items():
            if not 0 <= size <= 1 << 20:
                raise InputError(f"mesh.{name} = {size} must be between 0 (as many as there are) and {1 << 20}")
        if sum(size == 0 for size in sizes.values()) > 1:
            raise InputError(f"mesh: only one of {', '.join(DIMENSIONS)} may be 0, for as many ranks as there are")
        if self.exchange not in get_args(Exchange):
            raise InputError(f"mesh.exchange = {self.exchange!r} must be one of {', '.join(get_args(Exchange))}")

    def over(self, ranks: int) -> dict[str, int]:
        """The size of each dimension for so many ranks.

        Raises:
            InputError: they do not make such a mesh.
        """
        self.check()
        sizes = {name: size for name, size in asdict(self).items() if name in DIMENSIONS}
        given = 1
        for size in sizes.values():
            given *= size or 1
        open_one = next((name for name, size in sizes.items() if size == 0), None)
        if ranks % given or (open_one is None and ranks != given):
            shape = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(
                f"{ranks} ranks do not make a mesh of {shape}; start {given}{' or a multiple' if open_one else ''}, or "
                "change [mesh] in the recipe"
            )
        return sizes | ({} if open_one is None else {open_one: ranks // given})

    def check_rows(self, ranks: int, rows: int) -> None:
        """Refuse a batch of fewer rows than ranks that have rows of their own; they need not divide it.

        Raises:
            InputError: with both numbers, or those ranks do not make such a mesh.
        """
        sizes = self.over(ranks)
        if rows < (shares := sizes["replicate"] * sizes["shard"]):
            raise InputError(
                f"{rows} rows cannot be shared by {shares} ranks; raise training.batch_size, or mesh.chunk and "
                "mesh.tensor"
            )


def build_mesh(sizes: MeshSizes, device: torch.device | str = "cpu") -> DeviceMesh:
    """The mesh of all ranks that were started; needs `join` before.

    Raises:
        InputError: they do not make such a mesh.
    """
    shape = sizes.over(dist.get_world_size())
    return init_device_mesh(torch.device(device).type, tuple(shape.values()), mesh_dim_names=tuple(shape))


def rows_of(mesh: DeviceMesh, rows: int) -> range:
    """Which rows of a batch are this rank's; all ranks of a sequence have the same."""
    shares = mesh["replicate"].size() * mesh["shard"].size()
    share = mesh["replicate"].get_local_rank() * mesh["shard"].size() + mesh["shard"].get_local_rank()
    return range(share * rows // shares, (share + 1) * rows // shares)
