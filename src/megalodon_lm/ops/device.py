"""Where tensors live: the device by its name, and whether its memory suffices."""

import os

import torch

from ..errors import InputError


def choose_device(name: torch.device | str) -> torch.device:
    """The device of this name.

    Args:
        name: cpu, cuda, or cuda:N.

    Raises:
        InputError: another name, or a device that this machine or this PyTorch has not.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise InputError(f"device {str(name)!r} must be cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        why = f"this machine shows {found}" if torch.backends.cuda.is_built() else "this PyTorch is built without CUDA"
        raise InputError(f"device {str(name)!r} is none of the CUDA devices here: {why}; use cpu")
    return device


def check_memory(nbytes: int, device: torch.device | str, what: str, remedy: str) -> None:
    """Refuse what cannot fit, before it is allocated.

    Args:
        nbytes: at least needed.
        device: that holds it.
        what: needs it.
        remedy: what to lower.

    Raises:
        InputError: more than the device has in all; a machine that does not tell is trusted.
    """
    total = _total_memory(torch.device(device))
    if total is not None and nbytes > total:
        raise InputError(
            f"{what} needs at least {nbytes / 1e9:,.1f} GB, and there are {total / 1e9:,.1f} GB of memory; {remedy}"
        )


def _total_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
