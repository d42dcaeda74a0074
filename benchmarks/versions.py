"""Is a training step of this version slower than one of another? Both in turns, step for step.

    git worktree add ../before COMMIT
    python benchmarks/versions.py ../before/src --rounds 240

A process of each version trains the same model on the same random tokens; while one steps, the other waits. Reported is
the median of the rounds' ratios of seconds, this version's over the other's, and an interval that holds it in 95 of 100
cases whatever the spread is, from the ranks of the ratios. Any version whose models take `targets` will do.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Annotated

import tyro

import megalodon_lm
from megalodon_lm.files import write_atomically
from megalodon_lm.pairs import Timer, alternate

WORKER = """
import json, sys, time
import torch
from megalodon_lm import Megalodon, ModelConfig

size, rows, length, precision, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
torch.manual_seed(0)
model = Megalodon(ModelConfig.named(size))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
for line in sys.stdin:
    tokens = torch.randint(0, 256, (rows, length + 1))
    began = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        made = model(tokens[:, :-1], targets=tokens[:, 1:])
    (made[0] if isinstance(made, tuple) else made).backward()
    optimizer.step()
    print(time.perf_counter() - began, flush=True)
"""


@dataclass
class Versions:
    """See the head of the file."""

    other: Annotated[Path, tyro.conf.Positional]
    """Folder that holds the other version's package, such as ../before/src."""
    size: str = "small"
    """Which model."""
    rows: int = 4
    """Sequences of a step."""
    length: int = 1024
    """Tokens of each."""
    precision: str = "bf16"
    """bf16 or float32."""
    threads: int = 2
    """Of each version, while it is its turn."""
    rounds: int = 100
    """Steps of each after three unmeasured ones; at least 6."""
    json: Path | None = None
    """Write all seconds to this file."""


def stepping(source: Path, choices: Versions) -> Timer:
    """A process that trains with the package in a folder, one step each time it is asked."""
    if not (source / "megalodon_lm").is_dir():
        raise SystemExit(f"{source} holds no package megalodon_lm; give the src folder of a checkout")
    given = [choices.size, choices.rows, choices.length, choices.precision, choices.threads]
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, json.dumps(given)], env={**os.environ, "PYTHONPATH": str(source.resolve())},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    ask, answer = process.stdin, process.stdout

    def step() -> float:
        ask.write("\n")
        ask.flush()
        said = answer.readline()
        if not said:
            raise SystemExit(f"the version in {source} ended before its step did")
        return float(said)

    return step


def middle(ratios: list[float]) -> tuple[float, float, float]:
    """The median of at least six, and between which two of them that of all further rounds lies in 95 of 100 cases.

    As many ratios lie below it as heads come up in so many tosses: left out at either end are as many as heads come up
    in fewer than one case of 40.
    """
    tosses = accumulate(math.comb(len(ratios), heads) for heads in range(len(ratios)))
    left_out = sum(ways <= 2 ** len(ratios) / 40 for ways in tosses) - 1
    ordered = sorted(ratios)
    return median(ordered), ordered[left_out], ordered[-1 - left_out]


def main(choices: Versions) -> None:
    """Measure and show."""
    if choices.rounds < 6:
        raise SystemExit(f"rounds = {choices.rounds} are too few for an interval; give at least 6")
    here = Path(megalodon_lm.__file__).parent.parent
    timers = [stepping(source, choices) for source in (choices.other, here)]
    alternate(timers, 3)
    before, now = alternate(timers, choices.rounds)
    ratio, low, high = middle([a / b for a, b in zip(now, before, strict=True)])
    print(f"a step of the other version {median(before):.4g} s, of this one {median(now):.4g} s")
    print(f"this over the other, {choices.rounds} rounds: {ratio:.4f} ({low:.4f} to {high:.4f})")
    if choices.json is not None:
        write_atomically(choices.json, json.dumps({"other": before, "this": now}) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Versions))
