"""Memory of one device, by part."""

from dataclasses import dataclass

import torch

from ..architectures import build
from ..training.inspection import state_bytes_by_part
from .dry_run import DryRun
from .layout import Layout

FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        weights: this rank's share, in float32.
        optimizer: two moments of each.
        gradients: of each.
        gathered: weights and gradients of the two blocks in hand, whole, where ranks share them out.
        activations: kept for the backward pass.
        working: made for a moment.
        state: the State before a step and after it, and those before each segment.
        peak: the most at any time.
    """

    weights: float
    optimizer: float
    gradients: float
    gathered: float
    activations: float
    working: float
    state: float
    peak: float


def memory(layout: Layout, run: DryRun) -> Memory:
    """What a device needs.

    Args:
        layout: of the training.
        run: of one rank's tokens.
    """
    width = 2 if layout.precision == "bf16" else FLOAT32
    parameters = layout.config.num_parameters / layout.tensor
    share = parameters / layout.owners
    layers = layout.config.to_dict()["num_layers"]
    with torch.device("meta"):
        model = build(layout.local_config)
    dtype = torch.bfloat16 if layout.precision == "bf16" else torch.float32
    state = model.state_bytes(layout.rows, dtype)
    at_cut = layout.rows * sum(state_bytes_by_part(model, dtype, at_chunk_end=True).values())
    kept = run.kept - state
    if layout.checkpointing:
        by_layer = run.kept_by_layer - state / layers
        kept += layers * (run.residual - by_layer) + by_layer
    gathered = 0.0
    if layout.owners > 1:
        gathered = 2 * (parameters / layers) * (width + FLOAT32)
    states = 2 * state + (at_cut * layout.segments if layout.segments > 1 else 0)
    weights, gradients = FLOAT32 * share, FLOAT32 * share
    repeated = layout.accumulate * layout.segments > 1 or layout.owners > 1
    in_hand = kept + run.working + states + (gradients if repeated else 0)
    peak = 3 * weights + gathered + max(in_hand, gradients + states)
    return Memory(weights, 2 * weights, gradients, gathered, kept, run.working, states, peak)
