"""The table of ops: each is registered once, by the portable function that defines it; devices join with their own.

An op is imported from the file of its portable function. On a device that has a home, the implementation registered
there runs if it fits the tensors, elsewhere the portable function. A home is loaded when an op first meets a tensor of
its device, file by file: ops/cpu/cema.py holds what ops/cema.py defines.
"""

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from ..errors import InputError

Backend = Literal["auto", "portable"]
P = ParamSpec("P")
R = TypeVar("R")


class Home(NamedTuple):
    """The folder of the implementations for one kind of device, their name in reports, and the types they take."""

    folder: str
    title: str
    dtypes: tuple[torch.dtype, ...]


class Implementation(NamedTuple):
    """A function with the signature of its op, and whether it takes these arguments."""

    run: Callable[..., Any]
    fits: Callable[..., bool]


HOMES = {"cpu": Home("cpu", "native CPU kernels", (torch.float32, torch.bfloat16))}
OPS: dict[str, "Op[..., Any]"] = {}

_chosen: Backend = "auto"


def set_backend(name: Backend) -> None:
    """Choose for the whole process: "auto" takes native kernels where they apply, "portable" never.

    The environment variable MEGALODON_BACKEND sets the initial choice.

    Raises:
        InputError: unknown name.
    """
    global _chosen
    if name not in get_args(Backend):
        raise InputError(f"backend {name!r} must be one of {', '.join(get_args(Backend))}")
    _chosen = name


set_backend(os.environ.get("MEGALODON_BACKEND", "auto"))  # type: ignore[arg-type]


def runs_natively(x: Tensor) -> bool:
    """Whether implementations for its device take tensors of this type, by the present choice."""
    home = HOMES.get(x.device.type)
    return _chosen == "auto" and home is not None and x.dtype in home.dtypes


def describe(device: torch.device) -> str:
    """One line for reports: the implementation in use on a device."""
    home = HOMES.get(device.type)
    if _chosen != "auto" or home is None:
        return f"portable PyTorch on {device}"
    return f"{home.title} on {torch.get_num_threads()} threads" if device.type == "cpu" else home.title


class Op(Generic[P, R]):
    """A function whose first argument, a tensor, decides by its device and type which implementation runs.

    Autocast ends here: an op runs with it off, since sums, coefficients and statistics stay float32 or better.

    Args:
        portable: what the op means, on any device, with gradients. If it has an argument `out_dtype`, the type of
            autocast is handed on there, or that of the first argument where autocast is off.
        rounded: as many arguments at the front go into matrix products, in the type of autocast where that is on.
    """

    def __init__(self, portable: Callable[P, R], rounded: int):
        self.portable = portable
        self.name = portable.__name__
        self.rounded = rounded
        self.typed = "out_dtype" in inspect.signature(portable).parameters
        self.implementations: dict[str, Implementation] = {}
        functools.update_wrapper(self, portable)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[0]
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            if self.typed:
                kwargs.setdefault("out_dtype", x.dtype)
            return self.implementation(*args, **kwargs)(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device)
        if self.typed:
            kwargs.setdefault("out_dtype", dtype)
        given: Any = args
        if self.rounded:
            given = (*(t.to(dtype) for t in given[: self.rounded]), *given[self.rounded :])
        torch.set_autocast_enabled(device, False)  # torch.autocast takes as long as a small op
        try:
            return self.implementation(*given, **kwargs)(*given, **kwargs)
        finally:
            torch.set_autocast_enabled(device, True)

    def implementation(self, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        """The function that runs for these arguments."""
        x: Any = args[0]
        device = x.device.type
        if _chosen == "auto" and _load(self.name, device) and x.dtype in HOMES[device].dtypes:
            run, fits = self.implementations[device]
            if fits(*args, **kwargs):
                return run
        return self.portable


def op(rounded: int = 0) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Register a portable function as an op; see Op."""

    def register(portable: Callable[P, R]) -> Op[P, R]:
        assert portable.__name__ not in OPS, portable.__name__
        made = Op(portable, rounded)
        OPS[made.name] = made
        return made

    return register


def implements(
    op: Op[..., Any], device: str, fits: Callable[..., bool] = lambda *_, **__: True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function as the implementation of an op for a kind of device.

    Args:
        op: whose signature the function has.
        device: a key of HOMES.
        fits: called with the arguments of the op, whether the function takes them. The type of the first one is among
            those of the home.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        op.implementations[device] = Implementation(function, fits)
        return function

    return register


def _load(name: str, device: str) -> bool:
    """Whether an op has an implementation for a kind of device; the first call loads it."""
    implementations = OPS[name].implementations
    if device not in implementations and device in HOMES:
        package, _, file = OPS[name].portable.__module__.rpartition(".")
        module = f"{package}.{HOMES[device].folder}.{file}"
        if importlib.util.find_spec(module):
            importlib.import_module(module)
    return device in implementations


# What torch.compiler.assume_constant_result sets, which imports the compiler: no graph has to trace the loading.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]
