"""What the machine can do, for comparison with what a run does."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .precision import autocast

SIZE = 1024
SECONDS = 0.3


def describe(precision: str, device: torch.device) -> dict[str, Any]:
    """What a measurement was made on, for JSON: the processor by its name, threads, precision, versions."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = _processor()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "gflops": round(product_rate(precision, device) / 1e9),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def product_rate(precision: str, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations per second of matrix products of 1,024 rows, columns and terms: the best of a short trial."""
    a, b = (torch.ones(SIZE, SIZE, device=device) for _ in range(2))  # no random numbers: the run needs its own
    best = 0.0
    with autocast(precision, device), torch.no_grad():  # type: ignore[arg-type]
        a, b = (a.bfloat16(), b.bfloat16()) if precision == "bf16" else (a, b)
        ends = time.perf_counter() + SECONDS
        while time.perf_counter() < ends:
            began = clock()
            (a @ b).sum().item() if device.type != "cpu" else a @ b
            best = max(best, 2 * SIZE**3 / (clock() - began))
    return best
