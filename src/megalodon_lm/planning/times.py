"""How long a step takes: work at the rates of a device, and what waiting for other ranks adds."""

import math
from dataclasses import dataclass

from .devices import Device
from .dry_run import DryRun, Work
from .layout import Layout
from .traffic import Traffic, forwards_again

OPTIMIZER_BYTES = 32
"""Of each parameter in a step: AdamW reads weight, gradient and moments and writes all but the gradient; clipping."""


@dataclass(frozen=True)
class Times:
    """Seconds of a step.

    Attributes:
        products, attention, vectors, moved, calls: work by kind, see dry_run.Work.
        optimizer: the update.
        tensor: exchange inside layers, which nothing hides.
        waiting: of the last rank of a sequence for the others, or the work of the parallel exchange.
        gradients: exchange of weights and gradients beyond what the work hides.
        step: all of it.
    """

    products: float
    attention: float
    vectors: float
    moved: float
    calls: float
    optimizer: float
    tensor: float
    waiting: float
    gradients: float
    step: float


def seconds(work: Work, device: Device, precision: str) -> tuple[float, float, float, float, float]:
    """Products, those of attention, recurrences, moved bytes and calls."""
    rate = device.products if precision == "bf16" else device.float32_products
    return (
        work.products / rate, work.attention / (device.attention or rate), work.vectors / device.vectors,
        work.moved / (device.elementwise or device.bandwidth), work.calls * device.call,
    )  # fmt: skip


def times(layout: Layout, run: DryRun, sent: Traffic, device: Device) -> Times:
    """Of a step.

    Args:
        layout: of the training.
        run: of one rank's tokens.
        sent: in a step.
        device: each of them.
    """
    passes = layout.accumulate * layout.segments
    body = run.forward + run.head.times(-1)
    work = (run.forward + run.backward).times(passes) + body.times(forwards_again(layout))
    products, attention, vectors, moved, calls = seconds(work, device, layout.precision)
    share = layout.config.num_parameters / layout.tensor / layout.owners
    optimizer = OPTIMIZER_BYTES * share / device.bandwidth
    spans = layout.spans()
    over = {
        name: getattr(sent, name) / device.link(spans[name]) if getattr(sent, name) else 0.0
        for name in ("replicate", "shard", "tensor")
    }
    waiting = passes * lost(layout, run, sent, device)[layout.exchange]
    computed = products + attention + vectors + moved + calls
    gradients = max(0.0, over["replicate"] + over["shard"] - computed)
    step = computed + optimizer + over["tensor"] + waiting + gradients
    return Times(products, attention, vectors, moved, calls, optimizer, over["tensor"], waiting, gradients, step)


def lost(layout: Layout, run: DryRun, sent: Traffic, device: Device) -> dict[str, float]:
    """Seconds that chunk ranks lose in one pass forward and back, by the kind of exchange.

    In a chain a rank begins later than the one before it by its longest link, the norm or the average of one layer;
    the backward pass begins at the last rank, so that both delays add up. The parallel exchange runs norms and averages
    twice, and gathers all ranks' totals twice in each layer, forward and back.
    """
    ranks = layout.chunk
    if ranks == 1:
        return {"chain": 0.0, "parallel": 0.0}
    layers = layout.config.to_dict()["num_layers"]
    link = device.link(layout.spans()["chunk"])
    norms, averages = (sum(seconds(work, device, layout.precision)) for work in (run.norms, run.averages))
    hop = device.latency + sent.by_layer / link
    chain = (ranks - 1) * (max(norms, averages) / layers + 2 * hop)
    gather = math.ceil(math.log2(ranks)) * device.latency + (ranks - 1) * sent.by_layer / 2 / link
    return {"chain": chain, "parallel": norms + averages + 2 * (2 * layers + 1) * gather}
