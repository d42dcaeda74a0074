"""States of a model that is cut over tensor ranks: each rank has its heads, channels and groups of every row."""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..model.decoder import Decoder
from ..state import State
from ..state_spec import TensorSpec, named, tree_map


def gather_state(state: State, model: Decoder, mesh: DeviceMesh) -> State:
    """A state of shares to that of the whole model, on every rank; one that belongs to no model in this process."""

    def join(t: Tensor, share: TensorSpec, whole: TensorSpec) -> Tensor:
        dim = _cut(share, whole)
        if dim is None:
            return t
        given = DTensor.from_local(t.contiguous(), mesh, [Shard(dim)], run_check=False)
        return given.redistribute(placements=[Replicate()]).to_local()

    whole = model.declare_state()  # of DTensors, which tell their whole sizes
    return State(tree_map(join, state.parts, model.state_spec, whole), whole)


def share_state(state: State, model: Decoder, mesh: DeviceMesh) -> State:
    """This rank's share of a state that every rank has whole."""

    def take(t: Tensor, share: TensorSpec, whole: TensorSpec) -> Tensor:
        dim = _cut(share, whole)
        if dim is None:
            return t
        return t.narrow(dim, mesh.get_local_rank() * share.shape[dim - 1], share.shape[dim - 1]).clone()

    return State(tree_map(take, state.parts, model.state_spec, model.declare_state()), model.state_spec)


def distributed_state(state: State, model: Decoder, mesh: DeviceMesh) -> dict[str, Tensor]:
    """As State.used, of DTensors where ranks have shares.

    Args:
        state: of this rank's shares.
        model: on every rank.
        mesh: of the ranks of `tensor`.
    """
    used, whole = state.used(), dict(named(model.declare_state()))
    for name, share in named(model.state_spec):
        dim = _cut(share, whole[name])
        if dim is not None:
            used[name] = DTensor.from_local(used[name].detach().contiguous(), mesh, [Shard(dim)], run_check=False)
    return used


def _cut(share: TensorSpec, whole: TensorSpec) -> int | None:
    """The dimension of the tensor, rows included, along which a share is less than the whole."""
    return next((i for i, (a, b) in enumerate(zip(share.shape, whole.shape, strict=True), 1) if a != b), None)
