"""Trials of recall in prose: a trained language model is asked as it is, at a distance and a depth."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..model.language_model import LanguageModel
from ..training.precision import Precision
from .intervals import wilson
from .kept_trials import keep, read_figures
from .recall import BLOCK_TOKENS, answer
from .recall_prose import CHOICES, ProseTask

_DEPTHS = 1_000_000  # of which a depth is so many, in seeds


@dataclass(frozen=True)
class ProseTrial:
    """One model asked at one place.

    Raises:
        InputError: numbers that cannot be.
    """

    name: str
    """Of the model, for people."""
    model: LanguageModel | None
    """Trained. None where only what it once made of this is read."""
    task: ProseTask
    """Its prose is cut by the model's tokenizer; None where there is no model."""
    distance: int
    """In chunks of the task."""
    depth: float
    """Part of the prose before the needle."""
    texts: int
    """Each with CHOICES sequences."""
    seed: int = 0
    """Of the sequences."""
    precision: Precision = "float32"
    """Of matrix products."""

    def __post_init__(self) -> None:
        if not 0 <= self.depth < 1:
            raise InputError(f"depth {self.depth} must be at least 0 and below 1: a part of the prose")
        if self.texts < 1 or self.seed < 0:
            raise InputError(f"{self.texts} texts must be at least 1, and the seed {self.seed} not negative")

    @property
    def rows(self) -> int:
        """Sequences, each with one answer."""
        return self.texts * CHOICES

    @property
    def title(self) -> str:
        """Tells the trials of a folder apart."""
        place = f"{self.distance} chunks, depth {self.depth:g}"
        return f"{self.name}, {self.task.title}, {place}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        """Of its result."""
        return self.title.replace(", ", "-").replace(" ", "-") + ".json"

    def settings(self) -> dict[str, Any]:
        """All that decides what comes out, for JSON."""
        return {
            "model": self.model and self.model.fingerprint(),
            "task": self.task.settings(),
            "distance": self.distance,
            "depth": self.depth,
            "texts": self.texts,
            "seed": self.seed,
            "precision": self.precision,
        }


@dataclass(frozen=True)
class Found:
    """What a model makes of a needle."""

    trial: ProseTrial
    right: int
    """Sequences whose answer it holds for likelier than each other choice."""
    exact: int
    """Sequences whose answer, token by token, is the likeliest of the whole vocabulary."""
    margin: float
    """Log-likelihood of the answer over the mean of the other choices, in nats; 0 of one that remembers nothing."""
    margin_error: float
    """Standard error of its mean over the texts."""
    nats: float
    """Minus the mean log-likelihood of the answer."""
    state_bytes: int
    """See Recalled."""
    seconds: float
    """It took."""
    settings: dict[str, Any]
    """Those of the trial, also where its model is not at hand."""

    @property
    def interval(self) -> tuple[float, float]:
        """Of the fraction that is right, 95 %."""
        return wilson(self.right, self.trial.rows)

    @property
    def said(self) -> str:
        """In a few words."""
        return f"{self.right} of {self.trial.rows} right, margin {self.margin:+.3f} nats"

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        task = self.trial.task
        return {
            "model": self.trial.name,
            "task": task.name,
            "needles": task.needles,
            "question": task.question,
            "distance": self.trial.distance,
            "depth": self.trial.depth,
            "tokens_before_question": task.context(self.trial.distance, self.trial.depth),
            "margin": self.margin,
            "margin_error": self.margin_error,
            "right": self.right,
            "exact": self.exact,
            "rows": self.trial.rows,
            "accuracy": self.right / self.trial.rows,
            "interval": self.interval,
            "chance": task.chance,
            "nats": self.nats,
            "state_bytes": self.state_bytes,
            "seconds": self.seconds,
            "settings": self.settings,
        }

    @classmethod
    def read(cls, path: Path, trial: ProseTrial) -> "Found":
        """What an earlier run of a trial wrote.

        Raises:
            InputError: unreadable, or of other settings.
        """
        names = ("right", "exact", "margin", "margin_error", "nats", "state_bytes", "seconds", "settings")

        def settings(figures: dict[str, Any]) -> dict[str, Any]:
            written = dict(figures["settings"])
            if trial.model is None:
                written |= {"model": None, "task": written["task"] | {"tokenizer": None}}
            return written

        def found(figures: dict[str, Any]) -> Found:
            return cls(trial, *(figures[name] for name in names))

        return read_figures(path, trial.settings(), settings, found)


def find(trial: ProseTrial) -> Found:
    """Let a model read, and compare the choices."""
    assert trial.model is not None
    task, began = trial.task, time.perf_counter()
    at_once = max(1, BLOCK_TOKENS // (CHOICES * max(1, task.context(trial.distance, trial.depth))))
    likelihoods, exact, size = [], 0, 0
    for first in range(0, trial.texts, at_once):
        seed = (trial.seed, trial.distance, round(trial.depth * _DEPTHS), first)
        rows = min(at_once, trial.texts - first) * CHOICES
        sequences = task.sequences(rows, trial.distance, seed, trial.depth)
        hits, nats, size = answer(trial.model, sequences, trial.precision)
        exact += int((hits.sum(1) == sequences.learnt.sum(1))[::CHOICES].sum())
        likelihoods.append(-nats.sum(1).view(-1, CHOICES))
    of_answer, of_others = torch.cat(likelihoods).split([1, CHOICES - 1], 1)
    margins = (of_answer[:, 0] - of_others.mean(1)).view(trial.texts, CHOICES).mean(1)
    right = int((of_answer > of_others).all(1).sum())
    error = float(margins.std() / trial.texts**0.5) if trial.texts > 1 else 0.0
    seconds = time.perf_counter() - began
    margin, mean_nats = float(margins.mean()), -float(of_answer.mean())
    return Found(trial, right, exact, margin, error, mean_nats, size, seconds, trial.settings())


def find_all(
    trials: Sequence[ProseTrial], folder: Path, watch: Callable[[int], None] = lambda number: None
) -> Iterator[Found]:
    """Carry out trials one after the other, in a folder that keeps what is finished; see kept_trials.

    Args:
        trials: in order.
        folder: made if it is not there.
        watch: called with the number of each trial that begins.
    """

    def made(number: int, trial: ProseTrial) -> Found:
        watch(number)
        return find(trial)

    yield from keep(trials, folder, Found.read, made)
