"""Trials of recall: a model is trained from scratch on a task, tested, and what came out is kept in a file."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..architectures import ARCHITECTURES, build, config_class, config_of
from ..config import GECKO
from ..errors import InputError, nearest
from ..model.language_model import Config, LanguageModel
from ..training.optimizer import build_optimizer
from ..training.precision import autocast, choose_precision
from ..training.recipe import Recipe, TrainingRecipe
from ..training.schedule import learning_rate
from .kept_trials import keep, read_figures
from .recall import Recalled, RecallTask, ask
from .recall_tasks import VOCAB_SIZE, AssociativeRecall, SyntheticTask

CPU = torch.device("cpu")
GROWING = 0.5  # part of the training in which longer distances join
TRAINING, TESTING, CHOOSING = range(3)  # first numbers of the seeds of sequences: none has two uses
USED = (
    "steps", "batch_size", "learning_rate", "warmup_steps", "schedule", "final_learning_rate", "weight_decay", "beta1",
    "beta2", "clip", "precision", "seed",
)  # fmt: skip
"""What training a trial takes from the settings of a run; besides, the optimizer."""

SHARED = ("vocab_size", "num_layers", "chunk_size")
"""Keys of a configuration that a contender of another architecture takes over: a chunk is the unit of distance."""

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
    config: Config
    """Its vocabulary is the task's."""
    task: SyntheticTask
    """What is to be learnt."""
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
                    f"{self.task.pairs} pairs have no sequences of the {what} distances {list(distances)}; distances "
                    f"are at least 1 chunk, or 0 where pairs and queries fit into a chunk of {self.task.chunk_size}"
                )
        if self.test_rows < 1:
            raise InputError(f"{self.test_rows} sequences to test with must be at least 1")

    @property
    def title(self) -> str:
        """Tells the trials of a folder apart."""
        return f"{self.name}, {self.task.title}, {self.optimization}, seed {self.training.seed}"

    @property
    def optimization(self) -> str:
        """The learning rate, and the optimizer; AdamW, once the only one, is not named."""
        optimizer = "" if self.training.optimizer == "adamw" else f"{self.training.optimizer}, "
        return f"{optimizer}rate {self.training.learning_rate:g}"

    @property
    def file_name(self) -> str:
        """Of its result; associative recall, once the only task, is not named."""
        return self.title.replace(", mqar, ", ", ").replace(", ", "-").replace(" ", "-") + ".json"

    def settings(self) -> dict[str, Any]:
        """All that decides what comes out, for JSON."""
        used = USED if self.training.optimizer == "adamw" else (*USED, "optimizer", "matrix_learning_rate")
        return {
            "config": self.config.to_dict(),
            "task": self.task.settings(),
            "training": {key: value for key, value in asdict(self.training).items() if key in used},
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
    choice: float | None
    """Mean accuracy at the distances trained on, on sequences that are used for nothing else: by it optimizer and rate
    are chosen. None of a trial of an older version, which chose by what it reported."""

    @property
    def said(self) -> str:
        """In a few words."""
        by_distance = ", ".join(f"{r.distance}: {r.accuracy:.1%}" for r in self.recalled)
        return f"{by_distance}; {self.loss:.3f} nats an answer at the end, {self.seconds:,.0f} seconds"

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.trial.name,
            "task": self.trial.task.name,
            "pairs": self.trial.task.pairs,
            "question": self.trial.task.question,
            "optimizer": self.trial.training.optimizer,
            "learning_rate": self.trial.training.learning_rate,
            "seed": self.trial.training.seed,
            "accuracy_by_distance": {r.distance: r.accuracy for r in self.recalled},
            "interval_by_distance": {r.distance: r.interval for r in self.recalled},
            "right_by_distance": {r.distance: r.right for r in self.recalled},
            "answers_by_distance": {r.distance: r.answers for r in self.recalled},
            "state_bytes_by_distance": {r.distance: r.state_bytes for r in self.recalled},
            "state_bytes": self.state_bytes,
            "choice": self.choice,
            "parameters": self.trial.config.num_parameters,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "steps": self.trial.training.steps,
            "seconds": self.seconds,
            "settings": self.trial.settings(),
        }

    @classmethod
    def read(cls, path: Path, trial: Trial) -> "Result":
        """What an earlier run of a trial wrote; older versions knew one task alone, and its chunks were the model's.

        Raises:
            InputError: unreadable, or of other settings.
        """

        def settings(figures: dict[str, Any]) -> dict[str, Any]:
            written = figures["settings"]
            config = config_of(written["config"])
            task = (
                {}
                if "task" in written
                else AssociativeRecall(figures["pairs"], written["config"]["chunk_size"]).settings()
            )
            return {"task": task, **written, "config": config.to_dict()}

        def result(figures: dict[str, Any]) -> Result:
            by_distance = ("right_by_distance", "answers_by_distance", "state_bytes_by_distance")
            recalled = tuple(
                Recalled(int(distance), *(figures[name][distance] for name in by_distance))
                for distance in figures["accuracy_by_distance"]
            )
            loss = math.nan if figures["loss"] is None else figures["loss"]
            return cls(trial, recalled, loss, figures["seconds"], figures["state_bytes"], figures.get("choice"))

        return read_figures(path, trial.settings(), settings, result)


def contenders(
    config: Config, names: Sequence[str], changes: Mapping[str, Mapping[str, Any]], own_name: str
) -> dict[str, Config]:
    """Configurations to compare, for the vocabulary of the tasks.

    Args:
        config: what VARIANTS are made of; other architectures take over SHARED, as far as they have it, and get as many
            parameters to 1 %.
        names: of VARIANTS, or of registered architectures; none for the configuration as it is.
        changes: of single choices, by the name of a contender.
        own_name: of the configuration as it is.

    Raises:
        InputError: no such name, or choices that do not go with an architecture.
    """
    base = config_of(config.to_dict() | {"vocab_size": VOCAB_SIZE})
    known = {own_name: {}} if not names else VARIANTS
    found = {}
    for name in names or known:
        if name in known:
            values = base.to_dict() | known[name]
        elif name in ARCHITECTURES:
            kind, values = config_class(name), {"architecture": name, "parameters": base.num_parameters}
            values |= {key: value for key, value in base.to_dict().items() if key in SHARED and hasattr(kind, key)}
        else:
            every = {**VARIANTS, **ARCHITECTURES}
            raise InputError(f"no architecture {name!r}{nearest(name, every)}; there are {', '.join(every)}")
        found[name] = config_of(values | dict(changes.get(name, {})))
    for name in changes:
        if name not in found:
            raise InputError(f"choices are given for {name!r}, which is not compared{nearest(name, found)}")
    return found


def train(
    model: LanguageModel,
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
        task: whose vocabulary the model has.
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
        model = build(trial.config)
    began = time.perf_counter()
    loss = train(model, task, trial.train_distances, recipe, watch)
    seconds = time.perf_counter() - began

    def recalled(use: int, distances: Sequence[int]) -> tuple[Recalled, ...]:
        return tuple(
            ask(model, task, distance, trial.test_rows, (use, recipe.seed, distance), recipe.precision)
            for distance in sorted(set(distances))
            if task.fits(distance)
        )

    chosen = recalled(CHOOSING, trial.train_distances)
    choice = sum(r.accuracy for r in chosen) / len(chosen)
    return Result(trial, recalled(TESTING, trial.test_distances), loss, seconds, model.state_bytes(), choice)


def carry_out_all(
    trials: Sequence[Trial],
    folder: Path,
    device: torch.device = CPU,
    watch: Callable[[int, int, float], None] = lambda number, step, loss: None,
) -> Iterator[Result]:
    """Carry out trials one after the other, in a folder that keeps what is finished; see kept_trials.

    Args:
        trials: in order.
        folder: made if it is not there.
        device: where to train.
        watch: called after each step with the number of the trial, the steps done, and the loss.

    Raises:
        InputError: a folder that cannot be written, or one that holds other trials.
    """

    tried = {trial.optimization for trial in trials}

    def read(path: Path, trial: Trial) -> Result:
        result = Result.read(path, trial)
        if result.choice is None and len(tried) > 1:
            raise InputError(
                f"{path} is a trial of an older version, which measured nothing to choose a learning rate by; delete "
                "it, name another folder, or ask for one rate"
            )
        return result

    def made(number: int, trial: Trial) -> Result:
        return carry_out(trial, device, lambda step, loss: watch(number, step, loss))

    yield from keep(trials, folder, read, made)
