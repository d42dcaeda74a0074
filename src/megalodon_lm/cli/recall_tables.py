"""The tables of megalodon evaluate recall."""

from collections.abc import Iterable

from rich.table import Table

from ..evaluation.intervals import wilson
from ..evaluation.recall_prose_report import Reader, counted, margin
from ..evaluation.recall_report import Accuracy, Summary

WIDTH = 180


def learnt(summaries: Iterable[Summary]) -> Table:
    """A row for each contender and task."""
    summaries = list(summaries)
    distances = sorted({distance for s in summaries for distance in s.by_distance})
    guesses = ", ".join(f"{t.chance:.1%} ({t.title})" for t in dict.fromkeys(s.task for s in summaries))
    table = Table(
        title="Answers that are right, by chunks between content and answer",
        caption=f"with the 95 % interval, and the least and the most of several seeds; guessing gives {guesses}; "
        "state: bytes that are answered from at the last distance, and of the whole as it lies in memory",
    )
    for column in ("architecture", "task", "training", "seeds"):
        table.add_column(column)
    for column in (*map(str, distances), "state", "whole", "parameters", "seconds"):
        table.add_column(column, justify="right")
    for s in summaries:
        cells = (s.by_distance.get(distance) for distance in distances)
        table.add_row(
            s.name,
            s.task.title,
            s.results[0].trial.optimization,
            str(len(s.results)),
            *("" if cell is None else _shown(cell, len(s.results)) for cell in cells),
            f"{list(s.state_bytes.values())[-1]:,}",
            f"{s.results[0].state_bytes:,}",
            f"{s.results[0].trial.config.num_parameters:,}",
            f"{sum(r.seconds for r in s.results) / len(s.results):,.0f}",
        )
    return table


def _shown(at: Accuracy, seeds: int) -> str:
    scatter = f"; {at.least:.1%}-{at.most:.1%}" if seeds > 1 else ""
    return f"{at.mean:.1%} ({at.low:.1%}-{at.high:.1%}{scatter})"


def in_prose(readers: Iterable[Reader]) -> Table:
    """A row for each model, task and depth."""
    readers = list(readers)
    distances = sorted({distance for r in readers for distance in r.distances})
    chance = readers[0].found[0].trial.task.chance
    table = Table(
        title="Needles whose answer is held for likelier than each other choice, by chunks to the question",
        caption=f"with the 95 % interval, and by how many nats it is likelier than the mean of the others; guessing "
        f"gives {chance:.1%} and 0 nats",
    )
    for column in ("model", "task", "depth"):
        table.add_column(column)
    for column in map(str, distances):
        table.add_column(column, justify="right")
    for r in readers:
        for depth in r.depths:
            cells = []
            for found in (r.at(distance, depth) for distance in distances):
                if found:
                    right, rows = counted(found)
                    low, high = wilson(right, rows)
                    nats, error = margin(found)
                    cells.append(f"{right / rows:.1%} ({low:.1%}-{high:.1%}) {nats:+.3f} ± {error:.3f}")
                else:
                    cells.append("")
            table.add_row(r.name, r.title, f"{depth:g}", *cells)
    return table
