"""Devices as a plan knows them: a few published figures, or those of this machine, measured."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..errors import InputError, nearest
from ..layers.complex_ema import ComplexEMA
from ..training.machine import product_rate


@dataclass(frozen=True)
class Device:
    """Rates that work reaches on one device.

    Attributes:
        name: for reports.
        source: where its figures are from.
        memory: bytes.
        products: FLOP/s of bf16 matrix products, a multiply and an add as two.
        float32_products: the same in float32.
        vectors: FLOP/s of float32 outside matrix products, as CEMA's recurrence does them.
        bandwidth: bytes/s of its memory, read and written.
        call: seconds that an operator takes beside its work.
        near: bytes/s that it sends to one of its node.
        far: bytes/s that it sends to another node.
        node: devices in a node.
        latency: seconds until a message arrives.
    """

    name: str
    source: str
    memory: float
    products: float
    float32_products: float
    vectors: float
    bandwidth: float
    call: float = 0.0
    near: float = 0.0
    far: float = 0.0
    node: int = 1
    latency: float = 10e-6

    def link(self, span: int) -> float:
        """Bytes/s between neighbours of a group that spans so many devices in a row."""
        return self.near if span <= self.node else self.far

    def attaining(self, products: float, bandwidth: float) -> "Device":
        """The device with parts of its peak rates."""
        return replace(
            self, products=self.products * products, float32_products=self.float32_products * products,
            vectors=self.vectors * products, bandwidth=self.bandwidth * bandwidth,
            near=self.near * bandwidth, far=self.far * bandwidth,
        )  # fmt: skip


DEVICES = {
    device.name: device
    for device in (
        Device("a100", "NVIDIA's data sheet of the A100 SXM 80 GB (2021); a node of 8, HDR InfiniBand for each",
               80e9, 312e12, 19.5e12, 19.5e12, 2.039e12, 0.0, 300e9, 25e9, 8),
        Device("h100", "NVIDIA's data sheet of the H100 SXM (2023); a node of 8, NDR InfiniBand for each",
               80e9, 989e12, 67e12, 67e12, 3.35e12, 0.0, 450e9, 50e9, 8),
        Device("h200", "NVIDIA's data sheet of the H200 SXM (2024); a node of 8, NDR InfiniBand for each",
               141e9, 989e12, 67e12, 67e12, 4.8e12, 0.0, 450e9, 50e9, 8),
    )
}  # fmt: skip
"""Peaks as published; links in one direction."""

SECONDS = 0.3  # of each measurement
OF_A_STATE = 16
"""FLOPs of CEMA for a token and a state: decay, input and output, complex."""


def find_device(name: str, precision: Literal["bf16", "float32"]) -> Device:
    """A device by its name; `here` is this machine's processor, measured.

    Raises:
        InputError: unknown name; the message lists the known ones.
    """
    if name == "here":
        return measured(precision)
    if name not in DEVICES:
        raise InputError(f"unknown device {name!r}{nearest(name, DEVICES)}; known: {', '.join(DEVICES)}, here")
    return DEVICES[name]


def measured(precision: Literal["bf16", "float32"], clock: Callable[[], float] = time.perf_counter) -> Device:
    """This machine's processor, in a second or two.

    Args:
        precision: of the products that will be planned.
        clock: seconds; those of the processor where other work runs beside.
    """
    cpu = torch.device("cpu")
    rates = {kind: product_rate(kind, cpu, clock) for kind in {"float32", precision}}
    small, large = torch.ones(64), torch.ones(1 << 25)
    out = torch.empty_like(large)
    adding = _seconds(lambda: torch.add(large, 1.0, out=out), clock)
    return Device(
        "here", f"measured, {torch.get_num_threads()} threads",
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        rates[precision], rates["float32"], _averaging(clock), 2 * large.nbytes / adding,
        _seconds(lambda: small + small, clock), near=5e9, far=1e9, latency=50e-6,
    )  # fmt: skip


@torch.no_grad()
def _averaging(clock: Callable[[], float]) -> float:
    """FLOP/s of CEMA's recurrence over 1,024 tokens of 256 channels with 16 states each."""
    with torch.random.fork_rng():
        averages = ComplexEMA(256, 16)
        averages.init_weights()
    x = torch.ones(1, 1024, 256)
    return OF_A_STATE * 16 * x.numel() / _seconds(lambda: averages(x), clock)


def _seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The least that a call took."""
    work()  # takes the memory that it needs
    best, ends = float("inf"), clock() + SECONDS
    while (began := clock()) < ends:
        work()
        best = min(best, clock() - began)
    return best
