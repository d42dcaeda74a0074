"""What is each choice worth? Gecko's parts and the ablations, one by one and together, at equal parameters and tokens.

    python benchmarks/choices.py --out choices                                      # all, one after the other
    python benchmarks/choices.py --out choices --choices gecko sliding              # a part, say on another core
    python benchmarks/choices.py --out choices --no-train --json choices.json       # the table of what is there

For every choice one seed is trained at each learning rate, a shorter run; the rate that ends lowest is taken for all
seeds. A seed draws the weights and the order of the text, alike for all choices. Bits per byte are those of the
held-out novel, read once as a whole. A choice is compared with Megalodon of the same seed: mean of the differences, and
its standard error over the seeds, which is all that so few seeds can tell. Each finished run is a file in the output
folder, so that an interrupted command goes on where it was.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from megalodon_lm.cli.training import train_with_progress
from megalodon_lm.config import ModelConfig
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.recall_trials import VARIANTS
from megalodon_lm.evaluation.validation import Validation
from megalodon_lm.files import write_atomically
from megalodon_lm.training.recipe import Recipe
from megalodon_lm.training.trainer import Trainer

BASE = "megalodon"
CHOICES: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "sliding_memory": {"attention": "sliding", "memory": "adaptive"},
    "decay": {"timestep_norm": "decay"},
    "plain": {"residual": "plain"},
    "no_omega": {"cema_omega": False},
    "real_ema": {"cema": "real"},
    "no_ema": {"cema": "none"},
    "layer_norm": {"attention_norm": "layer"},
    "unnormalized": {"normalize_attention": False},
}


@dataclass
class Choices:
    """See the head of the file."""

    out: Path
    """Folder of the results."""
    choices: list[str] = field(default_factory=lambda: list(CHOICES))
    """Names of choices."""
    recipe: str = "quickstart"
    """A TOML file, or the name of one in the package."""
    set: list[str] = field(
        default_factory=lambda: ["model.chunk_size=128", "training.length=512", "training.batch_size=4"]
    )
    """Changes to the recipe, as for megalodon train."""
    steps: int = 800
    """Of each training."""
    tuning_steps: int = 200
    """Of each training that chooses a learning rate."""
    rates: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    """Factors on the recipe's learning rates, of matrices too."""
    seeds: int = 3
    """Trainings of each choice."""
    bytes: int = 200_000
    """Of the held-out novel, from its beginning; 0 for all."""
    train: bool = True
    """Whether to train what is missing."""
    json: Path | None = None
    """Write all figures to this file."""


def recipe_of(arguments: Choices, choice: str, rate: float, seed: int, steps: int) -> Recipe:
    """The recipe of one run."""
    recipe = Recipe.load(arguments.recipe)
    model = [f"model.{key}={json.dumps(value)}" for key, value in CHOICES[choice].items()]
    training = [f"training.steps={steps}", "training.minutes=0", "training.validate_steps=0", f"training.seed={seed}"]
    for change in (*arguments.set, *model, *training):
        recipe = recipe.changed(change)
    for key in ("learning_rate", "matrix_learning_rate"):
        recipe = recipe.changed(f"training.{key}={getattr(recipe.training, key) * rate}")
    return recipe


def result(arguments: Choices, choice: str, rate: float, seed: int, steps: int) -> float | None:
    """Bits per byte of one run; None if it is not there and shall not be made."""
    recipe = recipe_of(arguments, choice, rate, seed, steps)
    path = arguments.out / f"{choice}-{rate:g}-{seed}-{steps}.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found["recipe"] != recipe.to_toml() or found["bytes"] != arguments.bytes:
            raise InputError(f"{path} is of another recipe or text; take another --out")
        return float(found["bits_per_byte"])
    if not arguments.train:
        return None
    with TemporaryDirectory(prefix="choices-") as folder:
        trainer = Trainer(recipe, Path(folder) / "run")
        if not train_with_progress(trainer)[0]:
            raise KeyboardInterrupt
    measure = Validation(recipe.data.validation, arguments.bytes, trainer.tokenizer, trainer.precision)
    with trainer.averaged():
        value = measure(trainer.model.eval())
    record = {
        "bits_per_byte": value, "bytes": arguments.bytes, "parameters": recipe.model.num_parameters,
        "tokens": trainer.tokens, "seconds": trainer.seconds, "recipe": recipe.to_toml(),
    }  # fmt: skip
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    return value


def measure(arguments: Choices) -> Iterator[tuple[str, float, list[float]]]:
    """Name, best rate, and bits per byte of each seed, of every choice that is complete."""
    for choice in arguments.choices:
        tried = {rate: result(arguments, choice, rate, 0, arguments.tuning_steps) for rate in arguments.rates}
        known = {rate: value for rate, value in tried.items() if value is not None}
        if len(known) < len(tried):
            continue
        best = min(known, key=lambda rate: known[rate] if math.isfinite(known[rate]) else math.inf)
        values = [result(arguments, choice, best, seed, arguments.steps) for seed in range(arguments.seeds)]
        complete = [value for value in values if value is not None]
        if len(complete) == arguments.seeds:
            yield choice, best, complete


def compared(values: list[float], base: list[float]) -> tuple[float, float]:
    """Mean of the differences by seed, and its standard error."""
    differences = [a - b for a, b in zip(values, base, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return mean(differences), error


def main() -> None:
    """Train, compare, show, write."""
    arguments, console = tyro.cli(Choices, description=__doc__), Console()
    for choice in arguments.choices:
        if choice not in CHOICES:
            raise SystemExit(f"unknown choice {choice!r}; known: {', '.join(CHOICES)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {choice: (rate, values) for choice, rate, values in measure(arguments)}
    base = found[BASE][1] if BASE in found else None
    table = Table("", "parameters", "rate", "bits per byte", "by seed", f"minus {BASE}", "error")
    records = {}
    for choice, (rate, values) in found.items():
        config: ModelConfig = recipe_of(arguments, choice, rate, 0, arguments.steps).model
        difference = (math.nan, math.nan) if base is None else compared(values, base)
        by_seed = ", ".join(f"{value:.4f}" for value in values)
        figures = (f"{difference[0]:+.4f}", f"{difference[1]:.4f}")
        table.add_row(choice, f"{config.num_parameters:,}", f"{rate:g}", f"{mean(values):.4f}", by_seed, *figures)
        records[choice] = {
            "parameters": config.num_parameters, "rate": rate, "bits_per_byte": values,
            "difference": difference[0], "error": difference[1],
        }  # fmt: skip
    console.print(table)
    if arguments.json:
        write_atomically(arguments.json, json.dumps({"steps": arguments.steps, "choices": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
