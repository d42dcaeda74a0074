"""Is a plan right? Memory and time of training steps here, beside what the planner says of them.

    OMP_NUM_THREADS=1 python benchmarks/plan.py --json plan.json

Each configuration trains a few steps with the State carried. Memory is the peak beyond what was there before the model,
in a process that gives freed tensors back at once: one that keeps them, as trainings do, has gaps beside. Time is that
of the processor, in another process, so that other programs matter less.
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
from megalodon_lm.planning.devices import measured
from megalodon_lm.planning.layout import Layout
from megalodon_lm.planning.plan import Plan
from megalodon_lm.training.memory import forget_peak, keep_freed_memory, resident
from megalodon_lm.training.optimizer import build_optimizer
from megalodon_lm.training.passes import Forward, OnePass
from megalodon_lm.training.recipe import TrainingRecipe

CASES = {
    "small, 2 x 1,024, float32": ("small", 2, 1024, "float32", False),
    "bench22M, 1 x 2,048, bf16": ("bench22M", 1, 2048, "bf16", False),
    "small, 4 x 1,024, bf16, recomputed": ("small", 4, 1024, "bf16", True),
}
"""A size, rows, tokens of each, precision, and whether blocks are recomputed."""
STEPS = 4
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc: freed tensors at once


@dataclass
class Check:
    """See the head of the file."""

    cases: list[str] = field(default_factory=lambda: list(CASES))
    """Which of them."""
    json: Path | None = None
    """File for the figures."""
    only: Literal["", "seconds", "bytes"] = ""
    """Of the first case, what is measured in this process: what the program calls itself with."""


def step(name: str, seconds: bool) -> dict[str, Any]:
    """Seconds of a case, or bytes, planned and found."""
    if seconds:
        keep_freed_memory()
    size, rows, length, precision, checkpointing = CASES[name]
    config, cpu = ModelConfig.named(size), torch.device("cpu")

    def run(config: ModelConfig, steps: int) -> list[float]:
        model: Any = build(config, checkpointing).train()
        optimizer = build_optimizer(model, TrainingRecipe(), precision)
        once, state, took = OnePass(Forward(model, precision, cpu)), None, []
        tokens = torch.randint(0, config.vocab_size, (rows, length + 1))
        batch = Batch(tokens[:, :-1], tokens[:, 1:], None, None, None)
        for _ in range(steps):
            began = time.process_time()
            optimizer.zero_grad(set_to_none=True)
            state = once(batch, state, batch.num_learnt).state
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            took.append(time.process_time() - began)
        return took

    run(ModelConfig.named("tiny", cema_ndim=16), 2)  # loads and compiles
    layout = Layout(config, length, rows, precision=precision, checkpointing=checkpointing)
    plan = Plan.of(layout, measured(precision, time.process_time))
    forget_peak()
    before = resident() or 0
    took = run(config, STEPS)
    if seconds:
        return {"seconds": median(took[1:]), "planned_seconds": plan.times.step, "plan": plan.to_dict()}
    return {"bytes": (resident(peak=True) or 0) - before, "planned_bytes": plan.memory.peak}


def main(settings: Check) -> None:
    """Measure and show."""
    if settings.only:
        print(json.dumps(step(settings.cases[0], settings.only == "seconds")))
        return
    table, found = Table("", "memory", "planned", "ratio", "seconds a step", "planned", "ratio"), []
    for name in settings.cases:
        one: dict[str, Any] = {"case": name}
        for what, environment in (("seconds", {}), ("bytes", GIVING_BACK)):
            command = [sys.executable, __file__, "--only", what, "--cases", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
            one |= json.loads(done.stdout.splitlines()[-1])
        found.append(one)
        table.add_row(
            name, f"{one['bytes'] / 1e6:.0f} MB", f"{one['planned_bytes'] / 1e6:.0f} MB",
            f"{one['planned_bytes'] / one['bytes']:.2f}", f"{one['seconds']:.3f}", f"{one['planned_seconds']:.3f}",
            f"{one['planned_seconds'] / one['seconds']:.2f}",
        )  # fmt: skip
    Console().print(table)
    if settings.json:
        write_atomically(settings.json, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Check))
