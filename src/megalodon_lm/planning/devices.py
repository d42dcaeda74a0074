"""Devices as a plan knows them, by a few published figures; here.py measures this machine."""

from dataclasses import dataclass, replace

from ..errors import InputError, nearest


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
        attention: FLOP/s of products in attention; 0 for those of others.
        elementwise: bytes/s that norms, gates and sums read and write; 0 for those of the memory.
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
    attention: float = 0.0
    elementwise: float = 0.0

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


def find_device(name: str) -> Device:
    """A device by its name.

    Raises:
        InputError: unknown name; the message lists the known ones.
    """
    if name not in DEVICES:
        raise InputError(f"unknown device {name!r}{nearest(name, DEVICES)}; known: {', '.join(DEVICES)}, here")
    return DEVICES[name]
