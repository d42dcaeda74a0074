"""A plan: memory, traffic and time of a training, together."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from .devices import Device
from .dry_run import DryRun, dry_run
from .layout import Layout
from .memory import Memory, memory
from .times import Times, lost, seconds, times
from .traffic import Traffic, traffic


@dataclass(frozen=True)
class Plan:
    """What a training needs of each device.

    Attributes:
        layout: of it.
        device: each of them.
        run: one rank's pass.
        memory, traffic, times: by part, by link, by cause.
    """

    layout: Layout
    device: Device
    run: DryRun
    memory: Memory
    traffic: Traffic
    times: Times

    @classmethod
    def of(cls, layout: Layout, device: Device) -> "Plan":
        """Plan a training.

        Raises:
            InputError: sizes that do not divide, or a model that cannot be planned.
        """
        layout.check()
        run = dry_run(layout.local_config, layout.rows, layout.local, layout.precision)
        sent = traffic(layout, run)
        return cls(layout, device, run, memory(layout, run), sent, times(layout, run, sent, device))

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.layout.tokens / self.times.step / self.layout.devices

    @property
    def needed(self) -> float:
        """Operations of a step and device, without those that save memory."""
        return self.layout.tokens * self.layout.config.flops_per_token(backward=True) / self.layout.devices

    @property
    def utilisation(self) -> float:
        """Needed operations a second, over the rate of products that the device reaches."""
        rate = self.device.products if self.layout.precision == "bf16" else self.device.float32_products
        return self.needed / self.times.step / rate

    def exchanges(self, most: int = 256) -> list[dict[str, Any]]:
        """The same sequence over 2, 4, ... chunk ranks: what each exchange loses in a pass, down to a chunk each."""
        found, ranks = [], 2
        whole = self.layout.local * self.layout.chunk
        while ranks <= min(most, whole // self.layout.config.reading_unit):
            part = self.layout.chunk / ranks
            layout = replace(self.layout, chunk=ranks)
            run = replace(self.run, norms=self.run.norms.times(part), averages=self.run.averages.times(part))
            work = (self.run.forward + self.run.backward).times(part)
            each = sum(seconds(work, self.device, layout.precision))
            waits = lost(layout, run, self.traffic, self.device)
            found.append({"ranks": ranks, "tokens": whole // ranks, "pass": each, **waits})
            ranks *= 2
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        layout = {k: v for k, v in vars(self.layout).items() if k != "config"}
        return {
            "layout": {**layout, "devices": self.layout.devices, "tokens": self.layout.tokens},
            "device": asdict(self.device),
            "memory": asdict(self.memory),
            "work": {name: asdict(getattr(self.run, name)) for name in ("forward", "backward")},
            "traffic": asdict(self.traffic),
            "times": asdict(self.times),
            "tokens_per_second_and_device": self.tokens_per_second,
            "utilisation": self.utilisation,
            "exchanges": self.exchanges(),
        }
