"""What trials of recall say together: of each model the best learning rate, its accuracy by distance, and a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plots import log_axis, picture
from .recall_trials import Result


@dataclass(frozen=True)
class Summary:
    """One model on so many pairs, at the learning rate with which it recalled most, over its seeds."""

    results: tuple[Result, ...]
    """One a seed."""

    @property
    def name(self) -> str:
        """Of the model."""
        return self.results[0].trial.name

    @property
    def pairs(self) -> int:
        """In a sequence."""
        return self.results[0].trial.pairs

    @property
    def accuracy(self) -> float:
        """Mean over distances and seeds."""
        return sum(r.accuracy for r in self.results) / len(self.results)

    @property
    def by_distance(self) -> dict[int, tuple[float, float]]:
        """Mean accuracy and its standard error: of several seeds from their spread, of one as of a binomial."""
        found = {}
        for at in zip(*(r.recalled for r in self.results), strict=True):
            mean, count = sum(r.accuracy for r in at) / len(at), len(at)
            spread = sum((r.accuracy - mean) ** 2 for r in at)
            error = math.sqrt(spread / (count - 1) / count) if count > 1 else at[0].error
            found[at[0].distance] = (mean, error)
        return found

    @property
    def state_bytes(self) -> dict[int, int]:
        """By distance, of the State that the queries are answered from."""
        return {r.distance: r.state_bytes for r in self.results[0].recalled}

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.name,
            "pairs": self.pairs,
            "learning_rate": self.results[0].trial.training.learning_rate,
            "seeds": [r.trial.training.seed for r in self.results],
            "accuracy_by_distance": {distance: mean for distance, (mean, _) in self.by_distance.items()},
            "error_by_distance": {distance: error for distance, (_, error) in self.by_distance.items()},
            "state_bytes_by_distance": self.state_bytes,
            "state_bytes": self.results[0].state_bytes,
            "parameters": self.results[0].trial.config.num_parameters,
            "seconds": [r.seconds for r in self.results],
        }


def summarise(results: Sequence[Result]) -> list[Summary]:
    """One for each model and number of pairs, in the order in which they first come."""
    by_rate: dict[tuple[str, int], dict[float, list[Result]]] = {}
    for r in results:
        rates = by_rate.setdefault((r.trial.name, r.trial.pairs), {})
        rates.setdefault(r.trial.training.learning_rate, []).append(r)
    return [
        max((Summary(tuple(of_rate)) for of_rate in rates.values()), key=lambda s: s.accuracy)
        for rates in by_rate.values()
    ]


def draw(path: Path, summaries: Sequence[Summary]) -> None:
    """Accuracy by distance and by bytes of state, a row of panels for each number of pairs.

    Raises:
        InputError: the path cannot be written, or its ending names no kind of picture.
    """
    numbers = list(dict.fromkeys(s.pairs for s in summaries))
    rows = [[f"distance {pairs}", f"bytes {pairs}"] for pairs in numbers]
    with picture(path, rows, 3.2 * len(rows) + 0.4) as axes:
        legend: dict[str, Any] = {}
        for pairs in numbers:
            shown = [s for s in summaries if s.pairs == pairs]
            distances = sorted({distance for s in shown for distance in s.by_distance})
            by_distance, by_bytes = axes[f"distance {pairs}"], axes[f"bytes {pairs}"]
            for s in shown:
                means, errors = zip(*s.by_distance.values(), strict=True)
                places = [distances.index(distance) for distance in s.by_distance]
                drawn = by_distance.errorbar(places, [100 * m for m in means], [100 * e for e in errors], fmt="o-")
                legend.setdefault(s.name, drawn)
                by_bytes.plot(list(s.state_bytes.values()), [100 * m for m in means], "o", color=drawn[0].get_color())
            by_distance.set_xticks(range(len(distances)), [str(distance) for distance in distances])
            by_distance.set(xlabel="chunks between keys and queries", ylabel="values recalled, %")
            by_distance.set_title(f"{pairs} pairs (dotted: guessing among the {pairs} values)")
            by_bytes.set_title("By state where queries begin")
            log_axis(by_bytes.xaxis, [size for s in shown for size in s.state_bytes.values()])
            by_bytes.set(xlabel="bytes of state")
            for axis in (by_distance, by_bytes):
                axis.set_ylim(-4, 104)
                axis.axhline(100 / pairs, color="0.45", linestyle=":")
        axis.figure.legend(list(legend.values()), list(legend), loc="outside upper center", ncols=len(legend))
