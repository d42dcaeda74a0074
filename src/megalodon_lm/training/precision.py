"""Mixed precision, decided in one place: bf16 matrix products over float32 weights where the processor has them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from ..errors import InputError

Precision = Literal["auto", "bf16", "float32"]


def choose_precision(requested: Precision, device: torch.device) -> Literal["bf16", "float32"]:
    """Resolve "auto": bf16 where the device multiplies bf16 matrices natively, float32 elsewhere."""
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        native = any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return "bf16" if native else "float32"
    return "float32"


def autocast(precision: Literal["bf16", "float32"], device: torch.device) -> AbstractContextManager[object]:
    """The context in which a model runs at that precision; weights, statistics and CEMA stay float32 or better."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def check_precision(value: str) -> Precision:
    """Refuse an unknown precision.

    Raises:
        InputError: naming the value and the choices.
    """
    for known in get_args(Precision):
        if value == known:
            return known
    raise InputError(f"precision = {value!r} must be one of {', '.join(get_args(Precision))}")
