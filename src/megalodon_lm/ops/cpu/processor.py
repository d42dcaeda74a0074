"""What the processor can do that kernels make use of."""

import ctypes
import functools
import platform
import sys

import llvmlite.binding as llvm
from numba import config


@functools.cache
def has_bf16_vectors() -> bool:
    """Whether one instruction rounds sixteen float32 to bf16, and one adds the products of sixteen pairs to float32."""
    return _has("avx512bf16")


@functools.cache
def has_wide_vectors() -> bool:
    """Whether there are 32 registers of sixteen float32, whose reciprocals one instruction guesses."""
    return _has("avx512f")


@functools.cache
def fuses_floats() -> bool:
    """Whether one instruction multiplies eight float32 or more and adds them, on a processor of x86."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return _host_has("fma")


@functools.cache
def multiplies_tiles() -> bool:
    """Whether there are AMX tiles for bf16, and Linux lets this process use them."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not _has("amx-bf16"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _has(feature: str) -> bool:
    if any(getattr(config, name, None) for name in ("CPU_NAME", "CPU_FEATURES")):  # compiling for another processor
        return False
    return _host_has(feature)


def _host_has(feature: str) -> bool:
    try:
        return bool(llvm.get_host_cpu_features().get(feature, False))
    except RuntimeError:  # LLVM does not know this system's features
        return False
