"""Memory of the process: how much it has, and keeping what a training step frees for the next one."""

import ctypes
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_MMAP_THRESHOLD_MAX = 32 << 20  # glibc allows no more


def keep_freed_memory() -> bool:
    """Let the process keep memory it frees, for its whole life, where the C library is glibc.

    Otherwise glibc gives the activations of each step back to the system, which hands them out again one zeroed page at
    a time: tens of thousands of page faults a step.

    Returns:
        Whether it could be done.
    """
    if not sys.platform.startswith("linux"):
        return False
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is None:
        return False
    wishes = {_M_MMAP_THRESHOLD: _MMAP_THRESHOLD_MAX, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}
    return all([adjust(parameter, value) == 1 for parameter, value in wishes.items()])


def resident(peak: bool = False) -> int | None:
    """Bytes of this process in memory, now or at its peak; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    key = "VmHWM:" if peak else "VmRSS:"
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(key)), None)
