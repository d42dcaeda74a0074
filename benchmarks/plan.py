"""Is a plan right? Memory and time of training steps here, beside what the planner says of them.

    OMP_NUM_THREADS=1 python benchmarks/plan.py --json plan.json

Time: the rates of this machine are measured, a step is planned from them, steps are taken, and so on in turns, since a
machine is not the same from minute to minute. It is time of the processor, so that other programs matter less.

Memory: a plan counts the bytes of tensors. What a process holds is more, by what its allocator does not give back.
So the peak beyond what was there before the model is measured in a process whose allocator returns freed tensors to the
system at once (`tensors`), which is what was planned; and, for comparison, in one with the settings of a training run
(`training`).

The configurations here are none of those that the planner was made with: they are in FITTED.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from megalodon_lm.architectures import build
from megalodon_lm.config import ModelConfig
from megalodon_lm.data.batches import Batch
from megalodon_lm.files import write_atomically
from megalodon_lm.planning.here import measured
from megalodon_lm.planning.layout import Layout
from megalodon_lm.planning.plan import Plan
from megalodon_lm.planning.times import times
from megalodon_lm.training.memory import forget_peak, keep_freed_memory, resident
from megalodon_lm.training.optimizer import build_optimizer
from megalodon_lm.training.passes import Forward, OnePass
from megalodon_lm.training.recipe import TrainingRecipe

WIDE = {"num_layers": 4, "model_dim": 384, "z_dim": 192, "value_dim": 768, "ffn_hidden_dim": 1152, "chunk_size": 1024,
        "norm_num_groups": 12}  # fmt: skip
Case = tuple[str, dict[str, int], int, int, Literal["bf16", "float32"], bool]
FRESH: dict[str, Case] = {
    "mini, 4 x 1,024, float32": ("mini", {}, 4, 1024, "float32", False),
    "nano, 3 x 2,048, bf16": ("nano", {}, 3, 2048, "bf16", False),
    "bench22M, 3 layers, 1,024, float32, recomputed": ("bench22M", {"num_layers": 3}, 1, 1024, "float32", True),
}
FITTED: dict[str, Case] = {
    "micro, 16 x 512, bf16": ("micro", {}, 16, 512, "bf16", False),
    "384 wide, 4 layers, 2 x 2,048, bf16": ("small", WIDE, 2, 2048, "bf16", False),
    "small, 2 x 1,024, float32": ("small", {}, 2, 1024, "float32", False),
    "bench22M, 1 x 2,048, bf16": ("bench22M", {}, 1, 2048, "bf16", False),
    "small, 4 x 1,024, bf16, recomputed": ("small", {}, 4, 1024, "bf16", True),
}
CASES = FRESH | FITTED
"""A size, changes of it, rows, tokens of each, precision, and whether blocks are recomputed."""
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc: freed tensors at once


@dataclass
class Check:
    """See the head of the file."""

    cases: list[str] = field(default_factory=lambda: list(FRESH))
    """Which of them."""
    rounds: int = 3
    """Turns of measuring the machine and taking two steps."""
    json: Path | None = None
    """File for the figures."""
    only: Literal["", "seconds", "tensors", "training"] = ""
    """Of the first case, what is measured in this process: what the program calls itself with."""


class Steps:
    """Training steps of one case, with the State carried."""

    def __init__(self, config: ModelConfig, case: Case):
        _, _, rows, length, precision, checkpointing = case
        self.model: Any = build(config, checkpointing).train()
        self.optimizer = build_optimizer(self.model, TrainingRecipe(), precision)
        self.once, self.state = OnePass(Forward(self.model, precision, torch.device("cpu"))), None
        tokens = torch.randint(0, config.vocab_size, (rows, length + 1))
        self.batch = Batch(tokens[:, :-1], tokens[:, 1:], None, None, None)

    def take(self) -> float:
        """Seconds of one."""
        began = time.process_time()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = self.once(self.batch, self.state, self.batch.num_learnt).state
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return time.process_time() - began


def found(name: str, what: str, rounds: int) -> dict[str, Any]:
    """Seconds of a case, or bytes, and what was planned."""
    size, changes, rows, length, precision, checkpointing = case = CASES[name]
    config = ModelConfig.named(size, **changes)
    if what != "tensors":
        keep_freed_memory()
    warm = Steps(ModelConfig.named("tiny", cema_ndim=config.cema_ndim), (size, {}, 1, 64, precision, checkpointing))
    for _ in range(2):  # loads and compiles
        warm.take()
    layout = Layout(config, length, rows, precision=precision, checkpointing=checkpointing)
    plan = Plan.of(layout, measured(config, precision, time.process_time))
    forget_peak()
    before = resident() or 0
    steps = Steps(config, case)
    steps.take()
    if what != "seconds":
        steps.take()
        return {what: (resident(peak=True) or 0) - before, "planned_bytes": plan.memory.peak}
    turns = []
    for _ in range(rounds):
        device = measured(config, precision, time.process_time)
        planned = times(plan.layout, plan.run, plan.traffic, device)
        turns.append({"seconds": min(steps.take(), steps.take()), "planned": planned.step, "parts": vars(planned)})
    return {"turns": turns, "ratio": median(t["planned"] / t["seconds"] for t in turns)}


def main(settings: Check) -> None:
    """Measure and show."""
    if settings.only:
        print(json.dumps(found(settings.cases[0], settings.only, settings.rounds)))
        return
    table, all_found = Table("", "memory", "of it planned", "in training", "a step", "of it planned", "worst turn"), []
    for name in settings.cases:
        one: dict[str, Any] = {"case": name}
        for what in ("seconds", "tensors", "training"):
            command = [sys.executable, __file__, "--only", what, "--rounds", str(settings.rounds), "--cases", name]
            environment = os.environ | (GIVING_BACK if what == "tensors" else {})
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            one |= json.loads(done.stdout.splitlines()[-1])
        all_found.append(one)
        ratios = [turn["planned"] / turn["seconds"] for turn in one["turns"]]
        table.add_row(
            name, f"{one['tensors'] / 1e6:.0f} MB", f"{one['planned_bytes'] / one['tensors']:.2f}",
            f"{one['training'] / 1e6:.0f} MB", f"{median(turn['seconds'] for turn in one['turns']):.3f} s",
            f"{one['ratio']:.2f}", f"{max(ratios, key=lambda r: abs(r - 1)):.2f}",
        )  # fmt: skip
    Console().print(table)
    if settings.json:
        write_atomically(settings.json, json.dumps(all_found, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Check))
