"""What trials of recall in prose say together: accuracy and margin by distance and depth, and pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plots import HeatMap, draw_heat_maps, legend, legend_height, picture
from .intervals import wilson
from .recall_zero_shot import Found


@dataclass(frozen=True)
class Reader:
    """One model on one task, at all places it was asked."""

    found: tuple[Found, ...]

    @property
    def name(self) -> str:
        """Of the model."""
        return self.found[0].trial.name

    @property
    def title(self) -> str:
        """Of the task."""
        return self.found[0].trial.task.title

    def at(self, distance: int | None = None, depth: float | None = None) -> list[Found]:
        """What was found at a distance and a depth, of all seeds; None for any."""
        return [
            f for f in self.found if distance in (None, f.trial.distance) and (depth is None or f.trial.depth == depth)
        ]

    @property
    def distances(self) -> list[int]:
        """Short ones first."""
        return sorted({f.trial.distance for f in self.found})

    @property
    def depths(self) -> list[float]:
        """From the beginning of the prose on."""
        return sorted({f.trial.depth for f in self.found})


def counted(found: Sequence[Found]) -> tuple[int, int]:
    """Sequences that are right, and all of them."""
    return sum(f.right for f in found), sum(f.trial.rows for f in found)


def margin(found: Sequence[Found]) -> tuple[float, float]:
    """Mean over the sequences, which are as many in each, and its standard error."""
    error = math.sqrt(sum(f.margin_error**2 for f in found)) / len(found)
    return sum(f.margin for f in found) / len(found), error


def by_reader(found: Sequence[Found]) -> list[Reader]:
    """Results by model and task, in the order in which they first come."""
    readers: dict[tuple[str, str], list[Found]] = {}
    for f in found:
        readers.setdefault((f.trial.name, f.trial.task.title), []).append(f)
    return [Reader(tuple(of_reader)) for of_reader in readers.values()]


def draw(path: Path, readers: Sequence[Reader]) -> None:
    """Accuracy and margin by distance, over depths and seeds, a row of panels for each task.

    Raises:
        InputError: the path cannot be written, or its ending names no kind of picture.
    """
    titles = list(dict.fromkeys(r.title for r in readers))
    rows = [[f"accuracy {title}", f"margin {title}"] for title in titles]
    with picture(path, rows, 3.2 * len(rows) + 0.15 + legend_height({r.name for r in readers})) as axes:
        drawn: dict[str, Any] = {}
        for title in titles:
            shown = [r for r in readers if r.title == title]
            distances = sorted({d for r in shown for d in r.distances})
            accuracy, margins = axes[f"accuracy {title}"], axes[f"margin {title}"]
            for r in shown:
                places = [distances.index(d) for d in r.distances]
                counts = [counted(r.at(d)) for d in r.distances]
                means = [100 * right / rows for right, rows in counts]
                ends = [[100 * end for end in wilson(*count)] for count in counts]
                errors = [[abs(end[side] - m) for end, m in zip(ends, means, strict=True)] for side in (0, 1)]
                line = accuracy.errorbar(places, means, errors, fmt="o-")
                drawn.setdefault(r.name, line)
                nats = [margin(r.at(d)) for d in r.distances]
                colour = line[0].get_color()
                margins.errorbar(places, [m for m, _ in nats], [e for _, e in nats], fmt="o-", color=colour)
            for axis in (accuracy, margins):
                axis.set_xticks(range(len(distances)), [str(d) for d in distances])
                axis.set(xlabel="chunks between needle and question")
            accuracy.set_ylim(-4, 104)
            accuracy.axhline(100 * shown[0].found[0].trial.task.chance, color="0.45", linestyle=":")
            accuracy.set(ylabel="right, %")
            accuracy.set_title(title)
            margins.axhline(0, color="0.45", linestyle=":")
            margins.set(ylabel="nats")
            margins.set_title("Answer over other choices (dotted: guessing)")
        legend(accuracy, drawn)


def draw_depths(path: Path, readers: Sequence[Reader]) -> None:
    """Heat maps of accuracy by distance and depth, a panel for each model and task.

    Raises:
        InputError: the path cannot be written, or its ending names no kind of picture.
    """
    maps = []
    for r in readers:
        values = [[math.nan] * len(r.distances) for _ in r.depths]
        for row, depth in enumerate(r.depths):
            for column, distance in enumerate(r.distances):
                if found := r.at(distance, depth):
                    right, rows = counted(found)
                    values[row][column] = 100 * right / rows
        columns, labels = [str(d) for d in r.distances], [f"{d:g}" for d in r.depths]
        maps.append(HeatMap(f"{r.name}: {r.title}, % right", values, columns, labels))
    draw_heat_maps(path, maps, "chunks between needle and question", "depth")
