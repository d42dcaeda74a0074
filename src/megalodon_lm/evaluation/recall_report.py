"""What trials of recall say together: of each model the best rate and optimizer, accuracy by distance, and pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..plots import HeatMap, draw_heat_maps, legend, legend_height, log_axis, picture
from .intervals import wilson
from .recall_tasks import SyntheticTask
from .recall_trials import Result


class Accuracy(NamedTuple):
    """At one distance, over seeds."""

    mean: float
    """Of all answers."""
    low: float
    """The 95 % interval: for other sequences, asked of the same trained models."""
    high: float
    """The 95 % interval."""
    least: float
    """Of a seed: how far training itself scatters."""
    most: float
    """Of a seed."""


@dataclass(frozen=True)
class Summary:
    """One model on one task, with its optimizer and at its learning rate, over its seeds."""

    results: tuple[Result, ...]
    """One a seed."""

    @property
    def name(self) -> str:
        """Of the model."""
        return self.results[0].trial.name

    @property
    def task(self) -> SyntheticTask:
        """What was learnt."""
        return self.results[0].trial.task

    @property
    def choice(self) -> float:
        """What its optimizer and rate are chosen by, if there are others; see Result."""
        return sum(r.choice or 0.0 for r in self.results) / len(self.results)

    @property
    def by_distance(self) -> dict[int, Accuracy]:
        """Over the seeds."""
        found = {}
        for at in zip(*(r.recalled for r in self.results), strict=True):
            right, answers = sum(r.right for r in at), sum(r.answers for r in at)
            each = [r.accuracy for r in at]
            found[at[0].distance] = Accuracy(right / answers, *wilson(right, answers), min(each), max(each))
        return found

    @property
    def pairs_held(self) -> dict[int, float]:
        """By distance, of how many pairs the answer is known, if the others are guessed."""
        chance = self.task.chance
        if chance == 1:
            return {distance: at.mean for distance, at in self.by_distance.items()}
        return {
            distance: self.task.pairs * max(0.0, (at.mean - chance) / (1 - chance))
            for distance, at in self.by_distance.items()
        }

    @property
    def state_bytes(self) -> dict[int, int]:
        """By distance, of the State that is answered from."""
        return {r.distance: r.state_bytes for r in self.results[0].recalled}

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        accuracies = self.by_distance
        return {
            "model": self.name,
            "task": self.task.name,
            "pairs": self.task.pairs,
            "question": self.task.question,
            "optimizer": self.results[0].trial.training.optimizer,
            "learning_rate": self.results[0].trial.training.learning_rate,
            "seeds": [r.trial.training.seed for r in self.results],
            "chance": self.task.chance,
            "accuracy_by_distance": {distance: at.mean for distance, at in accuracies.items()},
            "interval_by_distance": {distance: (at.low, at.high) for distance, at in accuracies.items()},
            "seeds_by_distance": {distance: (at.least, at.most) for distance, at in accuracies.items()},
            "pairs_held_by_distance": self.pairs_held,
            "state_bytes_by_distance": self.state_bytes,
            "state_bytes": self.results[0].state_bytes,
            "parameters": self.results[0].trial.config.num_parameters,
            "seconds": [r.seconds for r in self.results],
        }


def summarise(results: Sequence[Result]) -> list[Summary]:
    """One for each model and task, in the order in which they first come.

    Of several optimizers and learning rates it has those which recalled most on the sequences kept for choosing, over
    the seeds; what is reported had no part in it.
    """
    tried: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for r in results:
        by_optimization = tried.setdefault((r.trial.name, r.trial.task.title), {})
        by_optimization.setdefault(r.trial.optimization, []).append(r)
    return [max((Summary(tuple(each)) for each in of.values()), key=lambda s: s.choice) for of in tried.values()]


def draw(path: Path, summaries: Sequence[Summary]) -> None:
    """Accuracy by distance and by bytes of state, a row of panels for each task.

    Raises:
        InputError: the path cannot be written, or its ending names no kind of picture.
    """
    tasks = list(dict.fromkeys(s.task for s in summaries))
    rows = [[f"distance {task.title}", f"bytes {task.title}"] for task in tasks]
    with picture(path, rows, 3.2 * len(rows) + 0.15 + legend_height({s.name for s in summaries})) as axes:
        drawn: dict[str, Any] = {}
        for task in tasks:
            shown = [s for s in summaries if s.task == task]
            distances = sorted({distance for s in shown for distance in s.by_distance})
            by_distance, by_bytes = axes[f"distance {task.title}"], axes[f"bytes {task.title}"]
            for s in shown:
                at = list(s.by_distance.values())
                places = [distances.index(distance) for distance in s.by_distance]
                errors = [[100 * (a.mean - a.low) for a in at], [100 * (a.high - a.mean) for a in at]]
                means = [100 * a.mean for a in at]
                line = by_distance.errorbar(places, means, errors, fmt="o-")
                drawn.setdefault(s.name, line)
                by_bytes.plot(list(s.state_bytes.values()), means, "o", color=line[0].get_color())
            by_distance.set_xticks(range(len(distances)), [str(distance) for distance in distances])
            by_distance.set(xlabel="chunks between content and answer", ylabel="answers right, %")
            by_distance.set_title(task.title)
            by_bytes.set_title("By state where answers begin (dotted: guessing)")
            log_axis(by_bytes.xaxis, [size for s in shown for size in s.state_bytes.values()])
            by_bytes.set(xlabel="bytes of state")
            for axis in (by_distance, by_bytes):
                axis.set_ylim(-4, 104)
                axis.axhline(100 * task.chance, color="0.45", linestyle=":")
        legend(axis, drawn)


def draw_pairs(path: Path, summaries: Sequence[Summary]) -> None:
    """Heat maps of accuracy by distance and number of pairs, a panel for each model and kind of task.

    Raises:
        InputError: the path cannot be written, or its ending names no kind of picture.
    """
    kinds: dict[str, list[Summary]] = {}
    for s in summaries:
        question = ", question before" if s.task.question == "before" else ""
        kinds.setdefault(f"{s.name}: {s.task.name}{question}, % right", []).append(s)
    maps = []
    for title, of_kind in kinds.items():
        distances = sorted({distance for s in of_kind for distance in s.by_distance})
        of_kind = sorted(of_kind, key=lambda s: s.task.pairs)
        values = [[100 * s.by_distance[d].mean if d in s.by_distance else math.nan for d in distances] for s in of_kind]
        maps.append(HeatMap(title, values, [str(d) for d in distances], [str(s.task.pairs) for s in of_kind]))
    draw_heat_maps(path, maps, "chunks between", "pairs")
