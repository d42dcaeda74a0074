"""What the machine can do, for comparison with what a run does."""

import time

import torch

from .precision import autocast

SIZE = 1024
SECONDS = 0.3


def product_rate(precision: str, device: torch.device) -> float:
    """Operations per second of matrix products of 1,024 rows, columns and terms: the best of a short trial."""
    a, b = (torch.ones(SIZE, SIZE, device=device) for _ in range(2))  # no random numbers: the run needs its own
    best = 0.0
    with autocast(precision, device), torch.no_grad():  # type: ignore[arg-type]
        a, b = (a.bfloat16(), b.bfloat16()) if precision == "bf16" else (a, b)
        ends = time.perf_counter() + SECONDS
        while time.perf_counter() < ends:
            began = time.perf_counter()
            (a @ b).sum().item() if device.type != "cpu" else a @ b
            best = max(best, 2 * SIZE**3 / (time.perf_counter() - began))
    return best
