"""What a device sends in a step, by dimension of the mesh."""

from dataclasses import dataclass

import torch

from ..architectures import build
from ..training.inspection import state_bytes_by_part
from .dry_run import DryRun
from .layout import Layout
from .memory import FLOAT32

TENSOR_FORWARD, TENSOR_BACKWARD = 7, 5
"""Residual streams that a block sends over tensor ranks: an all-gather counts one, an all-reduce two."""
TRAVELLING = ("norm", "cema")
"""Parts of a State that go from rank to rank where parts of a sequence are whole chunks."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in a step.

    Attributes:
        replicate: gradients, added up.
        shard: weights gathered for each pass forward and back, gradients added up and shared out.
        chunk: states, and their gradients.
        tensor: parts of the residual stream.
        by_layer: of one exchange of states: one layer's, of the rows in hand.
    """

    replicate: float
    shard: float
    chunk: float
    tensor: float
    by_layer: float


def traffic(layout: Layout, run: DryRun) -> Traffic:
    """What a device sends.

    Args:
        layout: of the training.
        run: of one rank's tokens.
    """
    layers = layout.config.to_dict()["num_layers"]
    parameters = layout.config.num_parameters / layout.tensor
    owners, copies = layout.owners, layout.copies
    width = 2 if layout.precision == "bf16" else FLOAT32
    passes = layout.accumulate * layout.segments
    forwards = passes + forwards_again(layout)
    replicate = 2 * (copies - 1) / copies * FLOAT32 * parameters / owners
    shard = (owners - 1) / owners * parameters * ((forwards + passes) * width + passes * FLOAT32)
    states = state_bytes(layout)
    others = layout.chunk - 1 if layout.exchange == "parallel" else min(1, layout.chunk - 1)
    chunk = (forwards + passes) * others * states
    tensor = (layout.tensor - 1) / layout.tensor * layers * run.residual
    tensor *= forwards * TENSOR_FORWARD + passes * TENSOR_BACKWARD
    return Traffic(replicate, shard, chunk, tensor, states / (layers + 1))


def forwards_again(layout: Layout) -> int:
    """Forward passes of a step beside those that a backward pass follows at once."""
    recomputed = layout.segments if layout.checkpointing else 0
    return layout.accumulate * (layout.segments - 1 + recomputed)


def state_bytes(layout: Layout) -> float:
    """Bytes of all states that go from one chunk rank to the next, of the rows in hand."""
    with torch.device("meta"):
        model = build(layout.local_config)
    parts = state_bytes_by_part(model, torch.float32, at_chunk_end=True)
    return layout.rows * sum(size for part, size in parts.items() if part in TRAVELLING)
