"""A module of which every tensor rank holds a part: its parameters are DTensors, and it computes with plain shares."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..ops.derived import forget
from .borders import Border, add_up, spread
from .vocabulary import here


@dataclass
class Part(ParallelStyle):
    """A module whose own parameters are cut, and what passes its borders.

    Attributes:
        cut: dimension by the name of a parameter, or of all of them as ""; the others stay whole.
        entering: of its first argument.
        leaving: of its result, or of the first of several.
        shared: the gradients of its whole parameters are shares that have to be added up.
    """

    cut: Mapping[str, int] = field(default_factory=dict)
    entering: Border | None = None
    leaving: Border | None = None
    shared: bool = False

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in module.named_parameters(recurse=False):
            dim = self.cut.get(name, self.cut.get(""))
            placement: Placement = Replicate() if dim is None else Shard(dim)
            given = distribute_tensor(parameter.detach(), device_mesh, [placement])
            module.register_parameter(name, nn.Parameter(given, requires_grad=parameter.requires_grad))
        module.register_forward_pre_hook(partial(self._enter, device_mesh))
        module.register_forward_hook(partial(self._leave, device_mesh), always_call=True)
        return module

    def _enter(self, mesh: DeviceMesh, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        show_shares(module, mesh if self.shared else None)
        return given if self.entering is None else (self.entering(given[0], mesh), *given[1:])

    def _leave(self, mesh: DeviceMesh, module: nn.Module, given: tuple[Any, ...], made: Any) -> Any:
        put_back(module)
        if self.leaving is None or made is None:  # it raised
            return made
        return (self.leaving(made[0], mesh), *made[1:]) if isinstance(made, tuple) else self.leaving(made, mesh)


class CutRows(Part):
    """An embedding of which a rank has some rows."""

    def _enter(self, mesh: DeviceMesh, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        vocabulary = len(module.get_parameter("weight"))  # of the DTensor: all
        given = super()._enter(mesh, module, given)
        rows, module._here = here(given[0], mesh, vocabulary)
        return (rows, *given[1:])

    def _leave(self, mesh: DeviceMesh, module: nn.Module, given: tuple[Any, ...], made: Any) -> Any:
        made = super()._leave(mesh, module, given, made)
        return None if made is None else add_up(torch.where(module.__dict__.pop("_here")[..., None], made, 0), mesh)


_SHOWN = "_cut_parameters"  # attribute of a module: its DTensors by name, while it sees its shares


def show_shares(module: nn.Module, adding: DeviceMesh | None = None) -> None:
    """Let a module see its own parameters as this rank's plain tensors.

    Args:
        module: until put_back.
        adding: where given, gradients of whole parameters are added up over it.
    """
    put_back(module)  # of a forward that was broken off
    kept: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        if not isinstance(parameter, DTensor):
            continue
        share = parameter.to_local()
        if torch.is_grad_enabled():
            forget([parameter._local_tensor])  # an optimiser may follow
            if adding is not None and parameter.placements == (Replicate(),):
                share = spread(share, adding)
        kept[name], module._parameters[name] = parameter, share
    setattr(module, _SHOWN, kept)


def put_back(module: nn.Module) -> None:
    """End what show_shares began."""
    module._parameters.update(module.__dict__.pop(_SHOWN, {}))


@contextmanager
def shares_shown(model: nn.Module) -> Iterator[None]:
    """Meanwhile every module of a model sees its own parameters as this rank's plain tensors."""
    for module in model.modules():
        show_shares(module)
    try:
        yield
    finally:
        for module in model.modules():
            put_back(module)
