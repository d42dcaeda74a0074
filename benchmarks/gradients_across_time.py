"""What exact gradients through a document gain over those cut at each segment.

    OMP_NUM_THREADS=1 python benchmarks/gradients_across_time.py --seeds 3 --json gradients_across_time.json

Trains one small model three ways on the same tokens of the bundled novels, in segments that carry the State on:

- whole: gradients flow through all segments of a step (`training.segment`);
- cut: the same steps of as many segments, gradients cut at each (`training.accumulate`);
- cut, more steps: cut, and a step of the optimiser after each segment, with the same memory.

Then each reads a novel that no training has seen, from its beginning and without a reset. Seeds change the initial
weights; differences are paired over seeds. Finished trainings stand in the file and are not done again.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from megalodon_lm.evaluation.validation import Validation
from megalodon_lm.files import write_atomically
from megalodon_lm.training.recipe import Recipe
from megalodon_lm.training.trainer import Trainer

WAYS = ("whole", "cut", "cut, more steps")


@dataclass
class AcrossTime:
    """See the head of the file."""

    size: str = "tiny"
    """A named size."""
    set: list[str] = field(default_factory=lambda: ["model.chunk_size=512"])
    """Changes to the recipe, as for megalodon train."""
    segment: int = 64
    """Tokens in memory at a time."""
    segments: int = 8
    """Of a step through which gradients flow."""
    rows: int = 8
    """Side by side."""
    steps: int = 500
    """Of all its segments."""
    seeds: int = 3
    """Trainings of each kind."""
    bytes: int = 200_000
    """To read of the unseen novel."""
    json: Path = Path("gradients_across_time.json")
    """File for the figures."""


def recipe_of(settings: AcrossTime, way: str, seed: int) -> Recipe:
    """The recipe of a training."""
    s = settings
    training = {
        "whole": {"length": s.segment * s.segments, "segment": s.segment, "steps": s.steps},
        "cut": {"length": s.segment, "accumulate": s.segments, "steps": s.steps},
        "cut, more steps": {"length": s.segment, "steps": s.steps * s.segments},
    }[way]
    common = {"batch_size": s.rows, "warmup_steps": training["steps"] // 20, "learning_rate": 4e-3, "seed": seed}
    recipe = Recipe.from_dict(
        {"model": {"size": s.size}, "data": {"section": 16384},
         "training": {**common, **training, "checkpoint_minutes": 1e6}}
    )  # fmt: skip
    for change in s.set:
        recipe = recipe.changed(change)
    return recipe


def train(settings: AcrossTime, way: str, seed: int) -> dict[str, Any]:
    """Bits per byte of the unseen novel after a training, and seconds of the processor it took."""
    recipe = recipe_of(settings, way, seed)
    with TemporaryDirectory(prefix="across-time-") as folder:
        trainer, began = Trainer(recipe, Path(folder) / "run"), time.process_time()
        if not trainer.train():
            raise KeyboardInterrupt
        took = time.process_time() - began
    trainer.model.eval()
    validation = Validation(["bundled:validation"], settings.bytes, trainer.tokenizer, trainer.precision)
    return {"way": way, "seed": seed, "bits_per_byte": validation(trainer.model), "seconds": took,
            "tokens": trainer.tokens}  # fmt: skip


def show(found: list[dict[str, Any]], console: Console) -> None:
    """Means over seeds, and differences to the cut."""
    by_way = {way: {one["seed"]: one["bits_per_byte"] for one in found if one["way"] == way} for way in WAYS}
    table = Table("", "bits per byte", "less than cut", "standard error", "by seed", "seconds of one")
    for way, values in by_way.items():
        if not values:
            continue
        gains = [by_way["cut"][seed] - value for seed, value in values.items() if seed in by_way["cut"]]
        error = f"{stdev(gains) / len(gains) ** 0.5:.4f}" if len(gains) > 1 else ""
        seconds = mean(one["seconds"] for one in found if one["way"] == way)
        table.add_row(way, f"{mean(values.values()):.4f}", f"{mean(gains):+.4f}" if gains else "", error,
                      ", ".join(f"{gain:+.4f}" for gain in gains), f"{seconds:.0f}")  # fmt: skip
    console.print(table)


def main(settings: AcrossTime) -> None:
    """Train, show, write."""
    asked = {key: value for key, value in vars(settings).items() if key not in ("json", "seeds")}
    known = json.loads(settings.json.read_text()) if settings.json.exists() else {"settings": asked, "found": []}
    if known["settings"] != asked:
        raise SystemExit(f"error: {settings.json} holds figures of other settings; name another file")
    found = known["found"]
    for seed in range(settings.seeds):
        for way in WAYS:
            if not any((one["way"], one["seed"]) == (way, seed) for one in found):
                found.append(train(settings, way, seed))
                write_atomically(settings.json, json.dumps(known, indent=2) + "\n")
    show(found, Console())


if __name__ == "__main__":
    main(tyro.cli(AcrossTime))
