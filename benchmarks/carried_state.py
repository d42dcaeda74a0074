"""Does it help to carry the State from step to step?

    python benchmarks/carried_state.py --steps 2000 --seeds 3 --json carried_state.json

Trains one recipe twice for each seed, on the same batches in the same order: once every row goes on from the State of
the step before, once every step begins from an empty one. Then both models read a long document that neither has seen,
in segments as long as a row of a training step: with the State carried through the whole document, and emptied before
each segment. What goes in is the same each time, the token before a segment included. Bits per byte are given by the
place of the segment; differences are paired over segments from the second one on, with their standard error, which
tells nothing of how much another seed would change: for that, see the spread over seeds.
"""

import itertools
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from megalodon_lm import State
from megalodon_lm.cli.training import train_with_progress
from megalodon_lm.data.corpus import Texts
from megalodon_lm.files import write_atomically
from megalodon_lm.generation.scoring import token_losses
from megalodon_lm.training.recipe import Recipe
from megalodon_lm.training.trainer import Trainer

TRIAL = 12  # steps from which minutes are turned into steps
WAYS = ("carried", "reset")
COMPARISONS = {
    "carried in training and reading - in neither": ("carried, carried", "reset, reset"),
    "trained carried - trained reset, both read carried": ("carried, carried", "reset, carried"),
    "trained carried: read carried - read reset": ("carried, carried", "carried, reset"),
    "trained reset: read carried - read reset": ("reset, carried", "reset, reset"),
}


@dataclass
class CarriedState:
    """See the head of the file."""

    recipe: str = "quickstart"
    """A TOML file, or the name of one in the package; its order becomes stream."""
    set: list[str] = field(default_factory=list)
    """Changes to the recipe, as for megalodon train."""
    steps: int = 1000
    """Of each training."""
    minutes: float = 0.0
    """For all trainings together, turned into as many steps for each after a short trial; 0 for steps."""
    seeds: int = 1
    """Pairs of trainings."""
    document: str = "bundled:validation"
    """To read: a text file, or the bundled novel that is held out."""
    bytes: int = 0
    """Of it, from its beginning; 0 for all."""
    json: Path | None = None
    """Write all figures to this file."""


def recipe_of(arguments: CarriedState) -> Recipe:
    """The recipe, with its steps, and whether State is carried left open."""
    recipe = Recipe.load(arguments.recipe)
    for change in ("data.order=stream", *arguments.set, "training.minutes=0", "training.validate_steps=0"):
        recipe = recipe.changed(change)
    steps = arguments.steps
    if arguments.minutes:
        seconds: list[float] = []
        with TemporaryDirectory(prefix="carried-state-") as folder:
            trial = Trainer(recipe.changed(f"training.steps={TRIAL}"), Path(folder) / "trial")
            trial.train(lambda metrics: seconds.append(metrics.seconds))
        step = median(b - a for a, b in itertools.pairwise(seconds))
        steps = max(1, int(60 * arguments.minutes / (2 * arguments.seeds * step)))
    return recipe.changed(f"training.steps={steps}")


@torch.inference_mode()
def by_segment(trainer: Trainer, tokens: np.ndarray, carry: bool) -> list[float]:
    """Bits per byte of each whole segment of a document."""
    model, length = trainer.model.eval(), trainer.recipe.training.length
    inputs = torch.from_numpy(np.concatenate([[trainer.tokenizer.begin], tokens[:-1]]))
    targets = torch.from_numpy(tokens)
    state: State | None = None
    found = []
    for at in range(0, len(tokens) - length + 1, length):
        piece = slice(at, at + length)
        nats, after = token_losses(model, inputs[None, piece], targets[None, piece], state, trainer.precision)
        state = after if carry else None
        num_bytes = len(trainer.tokenizer.decode_bytes(tokens[at : at + length]))
        found.append(nats.sum().item() / math.log(2) / num_bytes)
    return found


def measure(arguments: CarriedState) -> dict[str, Any]:
    """All figures: bits per byte {way of training, way of reading: (seeds, segments)}."""
    recipe = recipe_of(arguments)
    found: dict[str, list[list[float]]] = defaultdict(list)
    text = b"".join(next(iter(Texts([arguments.document]))).blocks)
    for seed, training in itertools.product(range(arguments.seeds), WAYS):
        changed = recipe.changed(f"training.seed={recipe.training.seed + seed}")
        changed = changed.changed(f"training.carry_state={str(training == 'carried').lower()}")
        with TemporaryDirectory(prefix="carried-state-") as folder:
            trainer = Trainer(changed, Path(folder) / "run")
            if not train_with_progress(trainer)[0]:
                raise KeyboardInterrupt
        tokens = trainer.tokenizer.encode(text[: arguments.bytes or None])
        with trainer.averaged():
            for reading in WAYS:
                found[f"{training}, {reading}"].append(by_segment(trainer, tokens, reading == "carried"))
    return {
        "recipe": recipe.to_toml(),
        "tokens": trainer.tokens,
        "bits_per_byte": found,
        "by_place": {way: by_place(np.array(values).mean(0)) for way, values in found.items()},
        "differences": {
            name: difference(np.array(found[a]) - np.array(found[b])) for name, (a, b) in COMPARISONS.items()
        },
    }


def by_place(segments: np.ndarray) -> dict[str, float]:
    """Means over the first segment, the second, the third and fourth, the fifth to eighth, and so on."""
    ends = [0, *itertools.takewhile(lambda end: end < len(segments), (1 << i for i in range(64))), len(segments)]
    return {
        f"{a + 1:,}" + (f" - {b:,}" if b > a + 1 else ""): segments[a:b].mean() for a, b in itertools.pairwise(ends)
    }


def difference(values: np.ndarray) -> dict[str, Any]:
    """Of the segments from the second on: mean, its standard error over segments, and the mean of each seed.

    Args:
        values: (seeds, segments).
    """
    later = values[:, 1:]
    segments = later.mean(0)
    error = segments.std(ddof=1) / math.sqrt(len(segments)) if len(segments) > 1 else math.nan
    return {"mean": segments.mean(), "error": float(error), "segments": len(segments), "seeds": later.mean(1).tolist()}


def show(found: dict[str, Any], console: Console) -> None:
    """Two tables."""
    ways = found["by_place"]
    title = f"bits per byte after {found['tokens']:,} tokens of training, by segment"
    table = Table("segment", *(f"trained {a},\nread {b}" for a, b in (w.split(", ") for w in ways)), title=title)
    for place in next(iter(ways.values())):
        table.add_row(place, *(f"{ways[way][place]:.4f}" for way in ways))
    console.print(table)
    table = Table("", "mean", "standard error", "by seed", title="bits per byte, from the second segment on; < 0 helps")
    for name, values in found["differences"].items():
        seeds = ", ".join(f"{mean:+.4f}" for mean in values["seeds"])
        table.add_row(name, f"{values['mean']:+.4f}", f"{values['error']:.4f}", seeds)
    console.print(table)


def main() -> None:
    """Measure, show, write."""
    arguments, console = tyro.cli(CarriedState, description=__doc__), Console()
    found = measure(arguments)
    show(found, console)
    if arguments.json:
        write_atomically(arguments.json, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
