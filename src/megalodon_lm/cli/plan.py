"""megalodon plan"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError

if TYPE_CHECKING:
    from ..planning.plan import Plan


@dataclass
class PlanCommand:
    """Memory, traffic and time of a training on devices that need not be there."""

    model: str = "paper7B"
    """A size such as paper7B, a .toml or .json file, or a model folder."""
    gpus: int = 1
    """Devices in all."""
    context: int = 32768
    """Tokens of a row in a step."""
    batch: int = 0
    """Tokens that a step learns from; 0 for one batch of all devices."""
    rows: int = 1
    """That a device reads at once."""
    replicate: int = 1
    """Ranks with the same weights and other rows."""
    shard: int = 0
    """Ranks that share the weights out and have other rows; 0 for all that are left."""
    chunk: int = 1
    """Ranks that share the length of each sequence."""
    tensor: int = 1
    """Ranks that share the width of each layer."""
    exchange: Literal["chain", "parallel"] = "chain"
    """Of states along a sequence."""
    segment: int = 0
    """Tokens of a row in memory at a time, as training.segment; 0 for all."""
    checkpointing: bool = False
    """Recompute blocks in the backward pass."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Of matrix products."""
    device: str = "a100"
    """a100, h100 or h200 by their published figures, or here: this machine's processor, measured."""
    attained: tuple[float, float] = (0.6, 0.8)
    """Parts of the published peaks that products, and memory and links, reach; not for here."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Carry out the command."""
        import json

        from ..planning.devices import find_device
        from ..planning.here import measured
        from ..planning.plan import Plan
        from .progress import results

        if not all(0 < part <= 1 for part in self.attained):
            raise InputError(f"--attained {self.attained[0]} {self.attained[1]}: parts must be above 0 and at most 1")
        if self.device == "here":
            layout = self._layout()
            plan = Plan.of(layout, measured(layout.config, self.precision))
        else:
            plan = Plan.of(self._layout(), find_device(self.device).attaining(*self.attained))
        if self.json:
            print(json.dumps(plan.to_dict(), indent=2))
            return
        for table in _tables(plan):
            results.print(table)

    def _layout(self) -> Any:
        from ..planning.layout import Layout
        from .models import find_config

        given = self.replicate * max(1, self.shard) * self.chunk * self.tensor
        if min(self.gpus, self.replicate, self.chunk, self.tensor) < 1 or self.shard < 0 or self.gpus % given:
            raise InputError(
                f"--gpus {self.gpus} cannot be replicate {self.replicate} x shard {self.shard or 'any'} x chunk "
                f"{self.chunk} x tensor {self.tensor}; the product must divide it"
            )
        shard = self.shard or self.gpus // given
        if self.replicate * shard * self.chunk * self.tensor != self.gpus:
            raise InputError(f"--gpus {self.gpus} is more than the {given} ranks of the mesh; set --shard 0")
        once = self.replicate * shard * max(1, self.rows) * max(1, self.context)
        accumulate = max(1, round(self.batch / once))
        return Layout(
            find_config(self.model), self.context, self.rows, accumulate, self.replicate, shard, self.chunk,
            self.tensor, self.exchange, self.precision, self.checkpointing, self.segment,
        )  # fmt: skip


def _tables(plan: "Plan") -> list[Any]:
    from rich.table import Table

    layout, device, sent, t = plan.layout, plan.device, plan.traffic, plan.times
    mesh = " x ".join(f"{name} {getattr(layout, name)}" for name in ("replicate", "shard", "chunk", "tensor"))
    memory = Table("memory of one device", "GB", title=f"{layout.devices:,} x {device.name}: {mesh}")
    for name, size in vars(plan.memory).items():
        memory.add_row(name, f"{size / 1e9:,.2f}")
    memory.add_row("of the device", f"{device.memory / 1e9:,.2f}")
    work = Table("a step", "", title=f"{layout.tokens:,} tokens")
    work.add_row("needed operations a device", f"{plan.needed / 1e12:,.1f} TFLOP")
    for name in ("replicate", "shard", "chunk", "tensor"):
        near = layout.spans()[name] <= device.node
        if getattr(sent, name):
            where = "within a node" if near else "between nodes"
            work.add_row(f"sent by a device, {name}", f"{getattr(sent, name) / 1e9:,.3f} GB {where}")
    for name, seconds in vars(t).items():
        if seconds:
            work.add_row(f"{name}", f"{seconds:,.4f} s")
    work.add_row("tokens a second and device", f"{plan.tokens_per_second:,.0f}")
    work.add_row("utilisation of products", f"{100 * plan.utilisation:.1f} %")
    tables = [memory, work]
    if lines := plan.exchanges():
        exchanges = Table("chunk ranks", "tokens of one", "a pass, s", "lost to the chain", "to the parallel exchange")
        for one in lines:
            parts = (f"{one[name]:.4f} s, {100 * one[name] / one['pass']:.1f} %" for name in ("chain", "parallel"))
            exchanges.add_row(f"{one['ranks']:,}", f"{one['tokens']:,}", f"{one['pass']:.4f}", *parts)
        tables.append(exchanges)
    return tables
