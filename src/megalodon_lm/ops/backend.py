"""The table of ops: each is registered once, by the portable function that defines it; devices join with their own.

An op is imported from the file of its portable function. On a device that has a home, the implementation registered
there runs if it fits the tensors, elsewhere the portable function. A home is loaded when an op first meets a tensor of
its device, file by file: ops/cpu/cema.py holds what ops/cema.py defines. If it does not work on this machine, one line
in the log says so, and the portable functions run.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
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
    """The folder of the implementations for one kind of device, their name in reports, and the types they take.

    Its package may have a function `try_out`, which raises KernelError where no implementation can work.
    """

    folder: str
    title: str
    dtypes: tuple[torch.dtype, ...]


class KernelError(RuntimeError):
    """A kernel that cannot be made on this machine; says which and why in one line."""


class Implementation(NamedTuple):
    """A function with the signature of its op, and whether it takes these arguments."""

    run: Callable[..., Any]
    fits: Callable[..., bool]


HOMES = {"cpu": Home("cpu", "native CPU kernels", (torch.float32, torch.bfloat16))}
OPS: dict[str, "Op[..., Any]"] = {}

_chosen: Backend = "auto"
_failures: dict[str, str | None] = {}  # of the homes tried so far: why they cannot be used, None where they can
_log = logging.getLogger("megalodon_lm")


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
    device = x.device.type
    return _chosen == "auto" and device in HOMES and x.dtype in HOMES[device].dtypes and _usable(device)


def describe(device: torch.device) -> str:
    """One line for reports: the implementation in use on a device."""
    home = HOMES.get(device.type)
    if _chosen != "auto" or home is None or not _usable(device.type):
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
            return self._run(device, args, kwargs)
        dtype = torch.get_autocast_dtype(device)
        if self.typed:
            kwargs.setdefault("out_dtype", dtype)
        given: Any = args
        if self.rounded:
            given = (*(t.to(dtype) for t in given[: self.rounded]), *given[self.rounded :])
        if torch.compiler.is_compiling():
            with torch.autocast(device, enabled=False):
                return self._run(device, given, kwargs)
        torch.set_autocast_enabled(device, False)  # torch.autocast takes as long as a small op
        try:
            return self._run(device, given, kwargs)
        finally:
            torch.set_autocast_enabled(device, True)

    def _run(self, device: str, args: Any, kwargs: Any) -> R:
        try:
            return self.implementation(*args, **kwargs)(*args, **kwargs)
        except KernelError as error:
            give_up(device, error)
            return self.portable(*args, **kwargs)

    def implementation(self, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        """The function that runs for these arguments."""
        x: Any = args[0]
        device = x.device.type
        if _chosen == "auto" and device in HOMES and x.dtype in HOMES[device].dtypes and _load(self.name, device):
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
    if not _usable(device):
        return False
    if device not in implementations:
        _import_if_there(f"{_package(device)}.{OPS[name].portable.__module__.rpartition('.')[2]}")
    return device in implementations


@functools.cache
def _import_if_there(module: str) -> None:
    """Look once: an op that a device has no file for is called as often as any other."""
    if importlib.util.find_spec(module):
        importlib.import_module(module)


def _usable(device: str) -> bool:
    """Whether the home of a kind of device works on this machine; the first call tries it."""
    if device not in _failures:
        _failures[device] = None
        try:
            getattr(importlib.import_module(_package(device)), "try_out", lambda: None)()
        except (ImportError, OSError, KernelError) as error:
            give_up(device, error)
    return _failures[device] is None


def _package(device: str) -> str:
    return f"{__name__.rpartition('.')[0]}.{HOMES[device].folder}"


def give_up(device: str, error: Exception) -> None:
    """Use no implementation for a kind of device any more, and say why in one line."""
    if _failures.get(device) is None:
        _failures[device] = str(error)
        _log.warning("%s are not used, portable PyTorch runs, several times slower: %s", HOMES[device].title, error)


# What torch.compiler.assume_constant_result sets, which imports the compiler: no graph has to trace the loading.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]
