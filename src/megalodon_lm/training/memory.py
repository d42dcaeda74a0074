"""Memory of the process: how much it has, and keeping what a training step frees for the next one."""

import ctypes
import os
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_MMAP_THRESHOLD_MAX, _MMAP_MAX = 32 << 20, 1 << 16  # the largest that glibc allows; how many blocks it maps by itself
_MADV_HUGEPAGE = 14  # of Linux's mman.h
_HUGE_PAGE = 2 << 20


def keep_freed_memory() -> bool:
    """Let the process keep memory it frees, for its whole life, in huge pages, where the C library is glibc.

    Otherwise glibc gives the activations of each step back to the system, which hands them out again one zeroed page at
    a time: tens of thousands of page faults a step. The heap is told to trim nothing and is extended at once by a third
    of the machine's memory, as addresses alone, for which the system is asked for huge pages. A kept heap has gaps;
    what does not fit into it comes and goes as ever.

    Returns:
        Whether memory is kept; huge pages depend on the system.
    """
    if not sys.platform.startswith("linux"):
        return False
    c = ctypes.CDLL(None)
    if not hasattr(c, "mallopt"):
        return False
    if not all([c.mallopt(_M_TRIM_THRESHOLD, -1) == 1, c.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX) == 1]):
        return False
    c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    c.free.argtypes = [ctypes.c_void_p]
    c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 3
    c.mallopt(_M_MMAP_MAX, 0)  # so that this block extends the heap
    heap = c.malloc(size)  # addresses alone: no page is taken before it is used
    c.mallopt(_M_MMAP_MAX, _MMAP_MAX)
    if heap is not None:
        first = -(-heap // _HUGE_PAGE) * _HUGE_PAGE
        c.madvise(first, (heap + size - first) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
        c.free(heap)  # the heap keeps them, being told to trim nothing
    return True


def forget_peak() -> None:
    """Give freed memory back to the system and let the peak begin anew, where the system can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        pass


def resident(peak: bool = False) -> int | None:
    """Bytes of this process in memory, now or at its peak; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    key = "VmHWM:" if peak else "VmRSS:"
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(key)), None)
