"""Trials of recall: a model is trained from scratch on a task, tested, and what came out is kept in a file."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import GECKO, ModelConfig
from ..errors import InputError, nearest
from ..files import FIGURES, check_writable, make_folder, write_atomically
from ..model.megalodon import Megalodon
from ..tables import read_table
from ..training.optimizer import build_optimizer
from ..training.precision import autocast, choose_precision
from ..training.recipe import Recipe, TrainingRecipe
from ..training.schedule import learning_rate
from .recall import VOCAB_SIZE, Recalled, RecallTask, ask

CPU = torch.device("cpu")
GROWING = 0.5  # part of the training in which longer distances join
TRAINING, TESTING = 0, 1  # first numbers of the seeds of sequences: none is tested that was trained on
USED = (
    "steps", "batch_size", "learning_rate", "warmup_steps", "schedule", "final_learning_rate", "weight_decay", "beta1",
    "beta2", "clip", "precision", "seed",
)  # fmt: skip
"""What training a trial takes from the settings of a run."""

VARIANTS: dict[str, dict[str, Any]] = {
    "megalodon": {},
    "sliding": {"attention": "sliding"},
    "memory": {"memory": "adaptive"},
    "gecko": GECKO,
}
"""Choices of a model to compare, as changes of its configuration: of Gecko's parts, those that carry words, each alone,
and all."""


@dataclass(frozen=True)
class Trial:
    """One model on one task with one learning rate and one seed.

    Raises:
        InputError: settings that cannot be trained with.
    """

    name: str
    """Of the model's choices, for people."""
    config: ModelConfig
    """Its vocabulary is the task's."""
    pairs: int
    """In a sequence."""
    train_distances: tuple[int, ...]
    """Each step learns from a batch of one of them; see train."""
    test_distances: tuple[int, ...]
    """Those at which the model is asked afterwards."""
    test_rows: int
    """Sequences of each."""
    training: TrainingRecipe
    """Of which USED count."""

    def __post_init__(self) -> None:
        Recipe(self.config, training=self.training).check()
        for what, distances in (("train", self.train_distances), ("test", self.test_distances)):
            if not any(map(self.task.fits, distances)):
                raise InputError(
                    f"{self.pairs} pairs have no sequences of the {what} distances {list(distances)}; distances are at "
                    f"least 1 chunk, or 0 where pairs and queries fit into a chunk of {self.config.chunk_size}"
                )
        if self.test_rows < 1:
            raise InputError(f"{self.test_rows} sequences to test with must be at least 1")

    @cached_property
    def task(self) -> RecallTask:
        """What is to be learnt."""
        return RecallTask(self.pairs, self.config.chunk_size)

    @property
    def title(self) -> str:
        """Tells the trials of a folder apart."""
        return f"{self.name}, {self.pairs} pairs, rate {self.training.learning_rate:g}, seed {self.training.seed}"

    @property
    def file_name(self) -> str:
        """Of its result."""
        return self.title.replace(", ", "-").replace(" ", "-") + ".json"

    def settings(self) -> dict[str, Any]:
        """All that decides what comes out, for JSON."""
        return {
            "config": self.config.to_dict(),
            "training": {key: value for key, value in asdict(self.training).items() if key in USED},
            "train_distances": list(self.train_distances),
            "test_distances": list(self.test_distances),
            "test_rows": self.test_rows,
        }


@dataclass(frozen=True)
class Result:
    """What came out of a trial."""

    trial: Trial
    recalled: tuple[Recalled, ...]
    """At each distance tested, short ones first."""
    loss: float
    """Mean of the last tenth of the steps, in nats an answer."""
    seconds: float
    """Of training."""
    state_bytes: int
    """Of a row of the model's State as it lies in memory, caches whole."""

    @property
    def accuracy(self) -> float:
        """Mean over the distances tested."""
        return sum(r.accuracy for r in self.recalled) / len(self.recalled)

    @property
    def said(self) -> str:
        """In a few words."""
        by_distance = ", ".join(f"{r.distance}: {r.accuracy:.1%}" for r in self.recalled)
        return f"{by_distance}; {self.loss:.3f} nats an answer at the end, {self.seconds:,.0f} seconds"

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.trial.name,
            "pairs": self.trial.pairs,
            "learning_rate": self.trial.training.learning_rate,
            "seed": self.trial.training.seed,
            "accuracy_by_distance": {r.distance: r.accuracy for r in self.recalled},
            "error_by_distance": {r.distance: r.error for r in self.recalled},
            "right_by_distance": {r.distance: r.right for r in self.recalled},
            "answers_by_distance": {r.distance: r.answers for r in self.recalled},
            "state_bytes_by_distance": {r.distance: r.state_bytes for r in self.recalled},
            "state_bytes": self.state_bytes,
            "parameters": self.trial.config.num_parameters,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "steps": self.trial.training.steps,
            "seconds": self.seconds,
            "settings": self.trial.settings(),
        }

    @classmethod
    def read(cls, path: Path, trial: Trial) -> "Result":
        """What an earlier run of a trial wrote.

        Raises:
            InputError: unreadable, or of other settings.
        """
        figures = read_table(path, "JSON", "the trial")
        try:
            settings = figures["settings"] | {"config": ModelConfig.from_dict(figures["settings"]["config"]).to_dict()}
            by_distance = ("right_by_distance", "answers_by_distance", "state_bytes_by_distance")
            recalled = tuple(
                Recalled(int(distance), *(figures[name][distance] for name in by_distance))
                for distance in figures["accuracy_by_distance"]
            )
            loss = math.nan if figures["loss"] is None else figures["loss"]
            found = cls(trial, recalled, loss, figures["seconds"], figures["state_bytes"])
        except (KeyError, TypeError, AttributeError, InputError):
            raise InputError(f"{path} is no trial of recall; name another folder") from None
        if settings != json.loads(json.dumps(trial.settings())):
            raise InputError(f"{path} is a trial with other settings; name another folder")
        return found


def vary(config: ModelConfig, variants: Sequence[str], name: str) -> dict[str, ModelConfig]:
    """A configuration with the choices of each variant, or as it is under a name, for the vocabulary of the task.

    Raises:
        InputError: no such variant, or choices that do not go with the configuration.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise InputError(f"no variant {variant!r}{nearest(variant, VARIANTS)}; variants: {', '.join(VARIANTS)}")
    base = config.to_dict() | {"vocab_size": VOCAB_SIZE}
    return {v: ModelConfig.from_dict(base | VARIANTS[v]) for v in variants} or {name: ModelConfig.from_dict(base)}


def train(
    model: Megalodon,
    task: RecallTask,
    distances: Sequence[int],
    recipe: TrainingRecipe,
    watch: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train a model on fresh sequences: each step learns from a batch of one distance, drawn at random.

    Distances grow: the shortest alone comes first, and over the first half of the steps the longer ones join it, one
    after the other. What is learnt of matching keys at a short distance is what a longer one needs too; of all at once,
    a model that has to carry words in its memory did not begin to learn.

    Args:
        model: new or not.
        task: with its chunk size.
        distances: in chunks; those that the task has no sequences of are left out.
        recipe: of which USED count.
        watch: called after each step with the steps done and its loss in nats an answer.

    Returns:
        The mean loss of the last tenth of the steps; NaN where one is not finite, and then training ended at once.
    """
    drawn = schedule([d for d in distances if task.fits(d)], recipe.steps, (TRAINING, recipe.seed))
    device = next(model.parameters()).device
    precision = choose_precision(recipe.precision, device)
    optimizer = build_optimizer(model, recipe, precision)
    model.train()
    last: list[float] = []
    for step, distance in enumerate(drawn):
        batch = task.sequences(recipe.batch_size, distance, (TRAINING, recipe.seed, step))
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision, device):
            loss, _ = model(batch.tokens.to(device), targets=batch.targets.to(device), learnt=batch.learnt)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if not math.isfinite(loss.item() + norm.item()):
            return math.nan
        rate = learning_rate(recipe, step, step / recipe.steps, recipe.warmup_steps / recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        last = [*last, loss.item()][-max(1, recipe.steps // 10) :]
        watch(step + 1, loss.item())
    return sum(last) / len(last)


def schedule(distances: Sequence[int], steps: int, seed: Sequence[int]) -> list[int]:
    """The distance of each step; see train."""
    random, distances = np.random.default_rng(list(seed)), sorted(set(distances))
    joined = (min(len(distances), 1 + int(len(distances) * step / (GROWING * steps))) for step in range(steps))
    return [distances[random.integers(number)] for number in joined]


def carry_out(
    trial: Trial, device: torch.device = CPU, watch: Callable[[int, float], None] = lambda step, loss: None
) -> Result:
    """Train and test a new model.

    Args:
        trial: what is asked.
        device: where to train.
        watch: see train.
    """
    recipe, task = trial.training, trial.task
    torch.manual_seed(recipe.seed)
    with device:
        model = Megalodon(trial.config)
    began = time.perf_counter()
    loss = train(model, task, trial.train_distances, recipe, watch)
    seconds = time.perf_counter() - began
    recalled = tuple(
        ask(model, task, distance, trial.test_rows, (TESTING, recipe.seed, distance), recipe.precision)
        for distance in sorted(set(trial.test_distances))
        if task.fits(distance)
    )
    return Result(trial, recalled, loss, seconds, model.state_bytes())


def carry_out_all(
    trials: Sequence[Trial],
    folder: Path,
    device: torch.device = CPU,
    watch: Callable[[int, int, float], None] = lambda number, step, loss: None,
) -> Iterator[Result]:
    """Carry out trials one after the other; each is kept in a file of the folder as soon as it is finished.

    Those whose file is there already are read from it. So an interrupted run is gone on with, and several processes may
    share a folder.

    Args:
        trials: in order.
        folder: made if it is not there.
        device: where to train.
        watch: called after each step with the number of the trial, the steps done, and the loss.

    Raises:
        InputError: a folder that cannot be written, or one that holds other trials.
    """
    make_folder(folder)
    paths = [folder / trial.file_name for trial in trials]
    known = {path: Result.read(path, t) for path, t in zip(paths, trials, strict=True) if path.exists()}
    for number, (path, trial) in enumerate(zip(paths, trials, strict=True)):
        if path not in known:
            check_writable(path, FIGURES)

            def follow(step: int, loss: float, number: int = number) -> None:
                watch(number, step, loss)

            known[path] = carry_out(trial, device, follow)
            write_atomically(path, json.dumps(known[path].figures(), indent=2) + "\n")
        yield known[path]
