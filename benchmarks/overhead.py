"""What does the loop around the model cost: batches, metrics, progress and checkpoints?

    python benchmarks/overhead.py --recipe quickstart --rounds 12 --json overhead.json

Trains as `megalodon train` does, in this process, in blocks of some steps. A round has four blocks, and every other
round goes in reverse order: bare steps (forward, backward, clipping and optimiser on the batches of the block before),
the loop, the loop again, and the loop with a checkpoint written from its first step on. Each is compared with its
neighbour, so that a change in the machine's own speed drops out. The parts of the loop are also timed one by one, as
means over all its steps. What a checkpoint costs is all time that its block takes longer.
"""

import functools
import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from megalodon_lm.cli.training import train_with_progress
from megalodon_lm.data.batches import Batch
from megalodon_lm.files import write_atomically
from megalodon_lm.training import trainer as loop
from megalodon_lm.training.checkpoint_writer import CheckpointWriter
from megalodon_lm.training.metrics import MetricsFile
from megalodon_lm.training.precision import autocast
from megalodon_lm.training.recipe import Recipe

ROUND = ("bare", "loop", "loop", "checkpoint")


@dataclass
class Overhead:
    """See the head of the file."""

    recipe: str = "quickstart"
    """A TOML file, or the name of one in the package."""
    set: list[str] = field(default_factory=list)
    """Changes to the recipe, as for megalodon train."""
    rounds: int = 12
    """Of four blocks."""
    block: int = 10
    """Steps of a block: more than one checkpoint takes to be written."""
    folder: Path | None = None
    """On the disk to write checkpoints on; everything is deleted again."""
    json: Path | None = None
    """Write all figures to this file."""


class Measured(loop.Trainer):
    """A run whose blocks and parts are timed, with blocks of bare steps between its own."""

    def __init__(self, recipe: Recipe, folder: Path, blocks: Sequence[str], length: int):
        super().__init__(recipe, folder)
        self.length, self.rest = length, iter(blocks)
        self.kind, self.began = "warm-up", 0.0
        self.blocks: list[tuple[str, float]] = []
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.recent: deque[Batch] = deque(maxlen=length * recipe.training.accumulate)
        self.bare_state: Any = None
        for name, owner, function in (
            ("reading a batch (thread)", self.batches, "read"),
            ("metrics", MetricsFile, "write"),
            ("looking at memory", loop, "resident"),
            ("writing a checkpoint (thread)", CheckpointWriter, "_write"),
        ):
            setattr(owner, function, self.timed(name, getattr(owner, function)))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted to a part."""

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.parts[name].append(time.perf_counter() - began)

        return call

    def train(self, watch: Any = None, validate: Any = None) -> bool:
        """As ever; blocks end where a step has been shown."""
        show = self.timed("progress", watch)

        def watched(metrics: loop.StepMetrics) -> None:
            show(metrics)
            if self.step % self.length == 0:
                self.turn()

        return super().train(watched, validate)

    def turn(self) -> None:
        """End a block, run the bare ones that follow, and begin the next."""
        if self.kind == "warm-up":
            self.parts.clear()
        else:
            self.blocks.append((self.kind, time.perf_counter() - self.began))
        while (kind := next(self.rest, "end")) == "bare":
            began, batches = time.perf_counter(), iter(tuple(self.recent))
            for _ in range(self.length):
                self.bare_step([next(batches) for _ in range(self.recipe.training.accumulate)])
            self.blocks.append((kind, time.perf_counter() - began))
        self.kind, self.began = kind, time.perf_counter()

    def bare_step(self, batches: list[Batch]) -> None:
        """What cannot be left out."""
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            state = self.bare_state if self.recipe.training.carry_state else None
            with autocast(self.precision, self.device):
                loss, state = self.model(
                    batch.inputs, state, targets=batch.targets, learnt=batch.learnt, document_starts=batch.starts
                )
            self.bare_state = state.detach()
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.training.clip)
        self.optimizer.step()

    def _step(self, batches: Iterator[Batch], rate: float) -> tuple[str, float, float]:
        return super()._step(self._kept(batches), rate)

    def _kept(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        following = self.timed("waiting for a batch", functools.partial(next, batches))
        while True:
            self.recent.append(following())
            yield self.recent[-1]

    def _save(self, writer: CheckpointWriter, metrics: MetricsFile) -> None:
        if self.kind == "checkpoint":
            self.timed("stopped by a checkpoint", super()._save)(writer, metrics)


def measure(arguments: Overhead) -> dict[str, Any]:
    """All figures, in seconds and fractions."""
    blocks = [kind for i in range(arguments.rounds) for kind in (ROUND, ROUND[::-1])[i % 2]]
    length = arguments.block
    recipe = Recipe.load(arguments.recipe, arguments.set)
    interval = 60 * recipe.training.checkpoint_minutes
    steps = length * (1 + sum(kind != "bare" for kind in blocks))
    for change in (f"steps={steps}", "minutes=0", "ramp_steps=0", "average=0", "validate_steps=0",
                   f"checkpoint_steps={length}", "checkpoint_minutes=1e9"):  # fmt: skip
        recipe = recipe.changed(f"training.{change}")
    with TemporaryDirectory(prefix="overhead-", dir=arguments.folder) as folder:
        trainer = Measured(recipe, Path(folder) / "run", blocks, length)
        train_with_progress(trainer)
    pairs = [dict(trainer.blocks[i : i + 2]) for i in range(0, len(blocks), 2)]
    parts, count = trainer.parts, steps - length
    checkpoint = {name: parts.pop(name) for name in ("stopped by a checkpoint", "writing a checkpoint (thread)")}
    per_step = {name: sum(times) / count for name, times in parts.items()}
    per_step["together, without threads"] = sum(s for name, s in per_step.items() if "thread" not in name)
    shortest = min(seconds for kind, seconds in trainer.blocks if kind == "loop")
    extra = [pair["checkpoint"] - pair["loop"] for pair in pairs if "checkpoint" in pair]
    return {
        "recipe": arguments.recipe, "changes": arguments.set, "threads": torch.get_num_threads(),
        "precision": trainer.precision, "parameters": recipe.model.num_parameters, "block": length,
        "blocks": trainer.blocks,
        "bare_step": median(seconds for kind, seconds in trainer.blocks if kind == "bare") / length,
        "loop_over_bare": [pair["loop"] / pair["bare"] for pair in pairs if "bare" in pair],
        "parts_per_step": per_step,
        "checkpoint": checkpoint,
        "checkpoint_extra": extra,
        "checkpoint_interval": interval,
        "checkpoint_fraction": median(extra) / interval,
        "written_in_block": max(checkpoint["writing a checkpoint (thread)"]) < shortest,
    }  # fmt: skip


def show(found: dict[str, Any]) -> Table:
    """The figures; spread is the least and the most."""
    step = found["bare_step"]
    table = Table("", "", "of a bare step", title=f"{found['parameters']:,} parameters, {found['precision']}")

    def spread(values: list[float], form: str, unit: str = "") -> str:
        return f"{median(values):{form}}{unit} ({min(values):{form}} - {max(values):{form}})"

    table.add_row("bare step", f"{1000 * step:,.1f} ms (median)", "")
    table.add_row("loop over bare, neighbours", "", spread([ratio - 1 for ratio in found["loop_over_bare"]], "+.2%"))
    for name, seconds in found["parts_per_step"].items():
        table.add_row(f"  {name}", f"{1000 * seconds:.3f} ms (mean)", f"{seconds / step:.3%}")
    stopped, written = found["checkpoint"].values()
    table.add_row("checkpoint: the loop stands still", spread(stopped, ".3f", " s"), "")
    table.add_row("checkpoint: its thread writes", spread(written, ".3f", " s"), "")
    table.add_row("checkpoint: longer than a neighbour", spread(found["checkpoint_extra"], ".3f", " s"), "")
    table.add_row(f"  one every {found['checkpoint_interval']:.0f} s", f"{found['checkpoint_fraction']:.3%}", "")
    if not found["written_in_block"]:
        table.caption = "A checkpoint took longer than a block; its cost is too low. Set a larger --block."
    return table


def main() -> None:
    """Measure, show, write."""
    arguments = tyro.cli(Overhead, description=__doc__)
    found = measure(arguments)
    Console().print(show(found))
    if arguments.json:
        write_atomically(arguments.json, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
