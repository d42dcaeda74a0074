"""This machine's processor as a device of a plan: what the parts of a model reach on it, measured at its own widths.

A product of narrow matrices runs far below the best rate of a processor, and what norms and gates read and write goes
by their arithmetic more than by the memory. So each kind of work is timed as the model does it, forward and backward.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..config import ModelConfig
from ..errors import InputError
from ..layers.complex_ema import ComplexEMA
from ..layers.norms import LayerNorm, RMSNorm, TimestepNorm
from ..model.assembly import build_block
from ..ops.chunk_attention import chunk_attention
from ..ops.gates import silu, silu_gate
from ..ops.residual import add_branch
from ..training.precision import autocast
from .devices import Device
from .dry_run import Record, span_of

SECONDS = 0.2  # of each measurement
TOKENS, WIDEST = 8192, 1 << 22  # that it is made with, enough to hide what a call takes by itself, and numbers of them


def measured(
    config: Any, precision: Literal["bf16", "float32"], clock: Callable[[], float] = time.perf_counter
) -> Device:
    """The processor, in a second or two.

    Args:
        config: of the model that is planned, a Megalodon with attention in chunks.
        precision: of its products.
        clock: seconds; those of the processor where other work runs beside.

    Raises:
        InputError: a model of another architecture.
    """
    if not isinstance(config, ModelConfig):
        raise InputError(f"this {config.architecture} cannot be planned: only a Megalodon with chunk attention can")
    with torch.random.fork_rng():  # a run needs its own numbers
        torch.manual_seed(0)
        rates = {kind: _rate(config, precision, kind, work, clock) for kind, work in _pieces(config, precision).items()}
    large = torch.ones(1 << 25)
    out = torch.empty_like(large)
    adding = _seconds(lambda: torch.add(large, 1.0, out=out), clock)
    return Device(
        "here", f"measured, {torch.get_num_threads()} threads",
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        rates["products"], rates["products"], rates["vectors"], 2 * large.nbytes / adding, 1 / rates["calls"],
        near=5e9, far=1e9, latency=50e-6, attention=rates["attention"], elementwise=rates["moved"],
    )  # fmt: skip


def _pieces(config: Any, precision: str) -> dict[str, Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]]:
    """By the kind of work that each is made of: what computes it, giving the result and what has gradients."""
    width, dim = torch.bfloat16 if precision == "bf16" else torch.float32, config.model_dim
    tokens = max(1, min(TOKENS, WIDEST // dim))
    length = max(1, tokens // 2 // config.chunk_size) * config.chunk_size
    x = torch.randn(1, tokens, dim, requires_grad=True)
    narrow = torch.randn(1, tokens, dim).to(width).requires_grad_()
    weight = torch.randn(config.ffn_hidden_dim, dim).to(width).requires_grad_()
    q, k, v = (
        torch.randn(1, length, config.num_heads, size // config.num_heads).to(width).requires_grad_()
        for size in (config.z_dim, config.z_dim, config.value_dim)
    )
    averages, norm = ComplexEMA(dim, config.cema_ndim), LayerNorm(dim, config.norm_eps)
    over_time = TimestepNorm(dim, dim // config.norm_num_groups, config.norm_eps)
    rms = RMSNorm(dim, config.norm_eps)
    block = build_block(config.named("tiny"), 0)
    for layer in (averages, norm, over_time, rms, block):
        for module in layer.modules():
            draw: Any = getattr(module, "init_weights", None)
            if draw is not None:
                draw()
    few = torch.randn(1, 4, 64, requires_grad=True)
    wide = [
        torch.randn(1, tokens, size).to(width).requires_grad_()
        for size in (config.value_dim, config.value_dim, config.value_dim, config.ffn_hidden_dim, config.ffn_hidden_dim)
    ]

    def elementwise() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """All of a block between its products."""
        tn = over_time(x)[0]
        y = norm(add_branch(add_branch(tn, rms(tn)), narrow))
        gates = silu(wide[0]), silu_gate(*wide[1:3]), silu_gate(*wide[3:])
        return [y, *gates], [x, narrow, *wide, *norm.parameters(), *over_time.parameters(), *rms.parameters()]

    return {
        "products": lambda: ([linear(narrow, weight)], [narrow, weight]),
        "attention": lambda: ([chunk_attention(q, k, v, config.chunk_size, config.rope_base)[0]], [q, k, v]),
        "vectors": lambda: ([averages(x)[0]], [x, *averages.parameters()]),
        "moved": elementwise,
        "calls": lambda: ([block(few)[0]], [few, *block.parameters()]),
    }


def _rate(
    config: Any, precision: Any, kind: str, work: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]],
    clock: Callable[[], float],
) -> float:  # fmt: skip
    """How much of a kind of work is done in a second."""

    def step() -> None:
        with autocast(precision, torch.device("cpu")):
            made, leaves = work()
        torch.autograd.grad(made, leaves, [torch.ones_like(t) for t in made])

    step()  # compiles
    with Record(span_of(config, config.chunk_size)) as record:
        step()
    amount: float = getattr(record.total(), kind)
    return amount / _seconds(step, clock)


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The least that a call took."""
    work()  # takes the memory that it needs
    best, ends = float("inf"), clock() + SECONDS
    while (began := clock()) < ends:
        work()
        best = min(best, clock() - began)
    return best
