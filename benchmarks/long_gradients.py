"""What exact gradients through a long document cost: memory against its length, time against plain segments.

    OMP_NUM_THREADS=1 python benchmarks/long_gradients.py --json long_gradients.json

Each document is one step of `training.length` tokens with the same `training.segment`, in a process of its own, whose
peak of memory counts beyond what was there before the step. Beside it the same tokens are trained on in plain segments,
each with the State of the one before it, detached, in turns; the cost is time of the processor.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from megalodon_lm.config import ModelConfig
from megalodon_lm.data.batches import Batch
from megalodon_lm.files import write_atomically
from megalodon_lm.model.megalodon import Megalodon
from megalodon_lm.tables import parse_value
from megalodon_lm.training.machine import describe
from megalodon_lm.training.memory import forget_peak, keep_freed_memory, resident
from megalodon_lm.training.passes import Forward, OnePass
from megalodon_lm.training.precision import choose_precision
from megalodon_lm.training.segments import SegmentedPass, cut

GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc
CPU = torch.device("cpu")


@dataclass
class LongGradients:
    """See the head of the file."""

    size: str = "tiny"
    """A named size."""
    set: list[str] = field(default_factory=list)
    """Changes to it, such as num_layers=2."""
    segment: int = 16384
    """Tokens in memory at a time."""
    lengths: list[int] = field(default_factory=lambda: [65536, 1048576])
    """Of the documents."""
    rounds: int = 2
    """In which plain segments and whole documents take turns; 0 for memory alone."""
    keep: bool = False
    """Keep the memory of freed tensors, as trainings do: faster, with gaps. Otherwise it goes back at once."""
    json: Path | None = None
    """File for the figures."""
    only: int = 0
    """A document's length: measure it in this process and write the figures out; what the program calls itself with."""


def step(settings: LongGradients, length: int) -> dict[str, Any]:
    """One document: bytes beyond what was there before, and seconds of the processor by the token of both ways."""
    if settings.keep:
        keep_freed_memory()
    changes = dict(change.split("=", 1) for change in settings.set)
    config = ModelConfig.named(settings.size, **{k: parse_value(v, k) for k, v in changes.items()})
    torch.manual_seed(0)
    model = Megalodon(config).train()
    forward = Forward(model, choose_precision("auto", CPU), CPU)
    whole, plain = SegmentedPass(forward, settings.segment), OnePass(forward)
    tokens = torch.randint(0, config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None, None, None)

    def segments() -> None:
        state = None
        for segment in cut(batch, settings.segment):
            state = plain(segment, state, length).state

    first = next(iter(cut(batch, 2 * settings.segment)))
    whole(first, None, length)  # loads and compiles
    forget_peak()
    before = resident() or 0
    whole(batch, None, length)
    found: dict[str, Any] = {"length": length, "bytes": (resident(peak=True) or 0) - before, "seconds": {}}
    for turn in range(settings.rounds):
        ways = [("whole", lambda: whole(batch, None, length)), ("plain", segments)]
        for name, run in ways if turn % 2 else reversed(ways):
            model.zero_grad(set_to_none=True)
            began = time.process_time()
            run()
            found["seconds"].setdefault(name, []).append((time.process_time() - began) / length)
    return found


def main(settings: LongGradients) -> None:
    """Measure and show."""
    if settings.only:
        print(json.dumps(step(settings, settings.only)))
        return
    found = []
    for length in settings.lengths:
        command = [sys.executable, __file__, "--only", str(length), "--size", settings.size]
        command += ["--segment", str(settings.segment), "--rounds", str(settings.rounds)]
        command += ["--set", *settings.set] if settings.set else []
        command += ["--keep"] if settings.keep else []
        environment = os.environ | ({} if settings.keep else GIVING_BACK)
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(
        "tokens", "peak beyond the model", "us a token, plain segments", "whole", "ratio",
        title=f"{settings.size}, segments of {settings.segment:,}, one row",
    )  # fmt: skip
    for one in found:
        times = {name: median(seconds) for name, seconds in one["seconds"].items()}
        shown = [f"{1e6 * times[name]:.2f}" for name in ("plain", "whole")] if times else ["", ""]
        ratio = f"{times['whole'] / times['plain']:.3f}" if times else ""
        table.add_row(f"{one['length']:,}", f"{one['bytes'] / 1e6:.1f} MB", *shown, ratio)
    Console().print(table)
    if settings.json:
        values = {"machine": describe(choose_precision("auto", CPU), CPU), "size": settings.size, "set": settings.set,
                  "segment": settings.segment, "documents": found}  # fmt: skip
        write_atomically(settings.json, json.dumps(values, indent=2))


if __name__ == "__main__":
    main(tyro.cli(LongGradients))
