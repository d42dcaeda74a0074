"""Showing a training run, for the commands that train."""

import math
from collections.abc import Callable
from typing import Any

from ..evaluation.validation import Validation
from ..training.memory import keep_freed_memory
from ..training.metrics import TEXT, StepMetrics, Units
from ..training.tensorboard import TensorBoard
from ..training.trainer import Trainer
from .progress import console, progress_bar

SAMPLES_FILE = "samples.txt"


class RunningMean:
    """A mean of what was added so far, later of about the last fifty; values that are not finite are left out."""

    def __init__(self) -> None:
        self.value, self._count = math.nan, 0

    def add(self, value: float) -> float:
        """Take one value in; returns the mean, NaN before the first."""
        if math.isfinite(value):
            self._count += 1
            self.value = value if self._count == 1 else self.value + max(0.02, 1 / self._count) * (value - self.value)
        return self.value


def _validation(trainer: Trainer) -> Validation:
    """Of the text that the recipe names; one rank keeps the samples, and makes them alone where it can."""
    data, ranks = trainer.recipe.data, trainer.ranks
    return Validation(
        data.validation, trainer.recipe.training.validate_bytes, trainer.tokenizer, trainer.precision,
        data.prompt if ranks.is_first or not ranks.holds_all else "",
        trainer.folder / SAMPLES_FILE if ranks.is_first else None,
        trainer.model if ranks.holds_all else None,
    )  # fmt: skip


def train_with_progress(
    trainer: Trainer,
    tensorboard: bool = False,
    validation: Callable[[Any], float] | None = None,
    units: Units = TEXT,
) -> tuple[bool, list[tuple[int, float]]]:
    """Train to the end with a bar.

    Args:
        trainer: of the run.
        tensorboard: write event files too.
        validation: see Trainer.train; None for the text that the recipe names.
        units: of its numbers.

    Returns:
        Whether the end was reached, and the curve (what was read, bits of what has a loss, smoothed over steps).
    """
    keep_freed_memory()
    config = trainer.recipe.model
    console.print(
        f"training {config.num_parameters:,} parameters on {trainer.device} in {trainer.precision}; {trainer.folder}",
    )
    for note in trainer.notes:
        console.print(note)
    if trainer.step:
        console.print(f"going on after step {trainer.step:,}, {trainer.tokens:,} {units.read}")
    if trainer.recipe.training.validate_steps and validation is None:
        validation = _validation(trainer)
    board = TensorBoard(trainer.folder, trainer.step) if tensorboard else None
    curve: list[tuple[int, float]] = []
    loss, speed, found = RunningMean(), RunningMean(), ""

    with progress_bar("train", 1.0) as move:

        def watch(m: StepMetrics) -> None:
            nonlocal found
            speed.add(m.tokens_per_second)
            if math.isfinite(loss.add(m.bits_per_token)):
                curve.append((m.tokens, loss.value))
            if board:
                board.write(m)
            if m.validation is not None:
                measured = units.validated(m.validation)
                console.print(f"step {m.step}: {measured} on the validation {'set' if units.of_classes else 'text'}")
                found = f"  {measured}" if units.of_classes else ""
            if m.event:
                console.print(f"step {m.step}: {m.event}")
            move(
                m.progress,
                f"step {m.step}  {loss.value:.3f} bits/{units.learnt}{found}  {speed.value:,.0f} {units.read}/s  "
                f"{m.utilisation:.0%}",
            )

        move(trainer.progress, "compiling kernels")
        finished = trainer.train(watch, validation)
    if board:
        board.close()
    if not finished:
        console.print(
            f"interrupted after {trainer.tokens:,} {units.read}; the weights are saved in {trainer.folder}; "
            "--resume last goes on"
        )
    return finished, curve
