"""Several results beside each other and beside published ones."""

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from .results import Results, TaskResult


class ResultsTable(NamedTuple):
    """A table of text: the first cell of a row is the model."""

    columns: list[str]
    rows: list[list[str]]
    source: str
    """Of the published rows."""


def published() -> dict[str, Any]:
    """Published scores: `columns`, `rows` and `source`, as in published.toml."""
    text = files(__package__).joinpath("published.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def table(results: Sequence[Results]) -> ResultsTable:
    """Results, a row each, under the published rows that share a task with them.

    Shares are shown in percent, with their standard error, and with the number of shots where the published ones had
    another; everything else as it is.

    Args:
        results: in the order of the rows.
    """
    known = published()
    measured = {result.task: result.headline for run in results for result in run.tasks}
    columns = [column for column in known["columns"] if column["task"] in measured]
    others = [task for task in measured if task not in {column["task"] for column in columns}]
    headings = [column["heading"] for column in columns] + [f"{task} {measured[task]}" for task in others]
    rows = []
    for row in known["rows"]:
        cells = [f"{row[c['task']]:.1f}" if c["task"] in row else "" for c in columns]
        if any(cells):
            rows.append([f"{row['model']}, published", *cells, *("" for _ in others)])
    for run in results:
        found = {result.task: result for result in run.tasks}
        cells = [_cell(found.get(c["task"]), c["metric"], c.get("shots", 0)) for c in columns]
        rows.append([run.name, *cells, *(_cell(found.get(task), measured[task]) for task in others)])
    return ResultsTable(["model", *headings], rows, " ".join(known["source"].split()))


def _cell(result: TaskResult | None, metric: str, shots: int | None = None) -> str:
    if result is None:
        return ""
    text = str(result.scores.get(metric) or result.scores[result.headline])
    return text if shots in (None, result.shots) else f"{text} ({result.shots}-shot)"
