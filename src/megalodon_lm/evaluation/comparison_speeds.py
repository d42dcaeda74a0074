"""How fast the contenders of a comparison train: steps of all in turns, so that what slows one slows all alike."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..pairs import Ratio, alternate, rate_ratio
from ..tables import read_sealed, write_sealed
from ..training.machine import describe
from ..training.run_lock import InUse, RunLock
from ..training.trainer import Trainer
from .comparison import Comparison

SPEEDS_FILE = "speeds.json"
ROUNDS, STEPS = 9, 3
"""Of the rounds each contender takes so many steps, after one that does not count: the others had the caches."""


class Speeds:
    """Seconds of training steps for each token, by contender and round.

    Args:
        seconds: by contender, of the same rounds.
        machine: they were measured on.
    """

    def __init__(self, seconds: dict[str, list[float]], machine: dict[str, Any]):
        self.seconds, self.machine = seconds, machine

    @classmethod
    def read(cls, out: Path, names: list[str]) -> "Speeds | None":
        """Those of the folder of a comparison; None where one of these contenders was not measured.

        Raises:
            InputError: the file is damaged.
        """
        if not (out / SPEEDS_FILE).exists():
            return None
        found = cls(**read_sealed(out / SPEEDS_FILE))
        return found if set(names) <= found.seconds.keys() else None

    def of(self, name: str) -> float:
        """Tokens a second."""
        return 1 / median(self.seconds[name])

    def ratio(self, name: str, base: str) -> Ratio:
        """Of a contender's speed to the base's."""
        return rate_ratio(self.seconds[name], self.seconds[base])


def measure_speeds(comparison: Comparison, out: Path, device: torch.device, say: Callable[[str], None]) -> None:
    """Write the speeds of all contenders into the folder of a comparison, if they are not there.

    Args:
        comparison: what was run.
        out: its folder.
        device: where.
        say: told in a line what is done.

    Raises:
        InputError: the folder cannot be written.
    """
    names = list(comparison.contenders)
    if Speeds.read(out, names) is not None:
        return
    try:
        lock = RunLock(out)
    except InUse:
        return  # another process is measuring
    try:
        say("speeds: steps of all contenders in turns; other programs should rest meanwhile")
        with TemporaryDirectory(dir=out, prefix=".speeds-") as folder:
            runs = {name: comparison.full(name, 1.0, 0).recipe for name in names}
            trainers = {name: Trainer(recipe, Path(folder) / name, device) for name, recipe in runs.items()}
            timers = [partial(_seconds_per_token, trainer) for trainer in trainers.values()]
            seconds = dict(zip(names, alternate(timers, ROUNDS), strict=True))
            for trainer in trainers.values():
                trainer.run.lock.release()
        machine = describe(trainers[comparison.settings.base].precision, device)
        write_sealed(out / SPEEDS_FILE, {"seconds": seconds, "machine": machine})
    finally:
        lock.release()


def _seconds_per_token(trainer: Trainer) -> float:
    _step(trainer)
    begun = time.perf_counter()
    tokens = sum(_step(trainer) for _ in range(STEPS))
    return (time.perf_counter() - begun) / tokens


def _step(trainer: Trainer) -> int:
    """All that a step computes; the tokens of it."""
    batch = trainer.batches.read(trainer.cursor)
    trainer.cursor = batch.cursor
    trainer.model.train()
    trainer.optimizer.zero_grad(set_to_none=True)
    _, trainer.state = trainer.passes(batch, trainer.state, batch.num_learnt)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.recipe.training.clip)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.optimizer.step()
    return batch.num_read
