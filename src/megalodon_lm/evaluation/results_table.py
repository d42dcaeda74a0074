"""Several results beside each other and beside published ones."""

import tomllib
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
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
    """Results, a row for each model, under the published rows that share a task with them.

    Shares are shown in percent, with their standard error, and with the number of shots where the published ones had
    another; everything else as it is. Where results of a task have different versions or numbers of questions, each
    says its own. Files of one model are one row, unless they have a task in common; models of one name show what else
    tells them apart, the beginning of their fingerprints.

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
    differ = {task for task in measured if len({_kind(r) for run in results for r in run.tasks if r.task == task}) > 1}
    for name, found in _by_model(results):
        cells = [_cell(found.get(c["task"]), c["metric"], differ, c.get("shots", 0)) for c in columns]
        rows.append([name, *cells, *(_cell(found.get(task), measured[task], differ) for task in others)])
    return ResultsTable(["model", *headings], rows, " ".join(known["source"].split()))


def _by_model(results: Sequence[Results]) -> list[tuple[str, dict[str, TaskResult]]]:
    """A name for each row, and its results by task."""
    rows: list[tuple[str, str, dict[str, TaskResult]]] = []
    for run in results:
        found = {result.task: result for result in run.tasks}
        fingerprint = str(run.model.get("fingerprint", ""))
        same = [row for row in rows if row[:2] == (run.name, fingerprint) and not row[2].keys() & found.keys()]
        if same:
            same[0][2].update(found)
        else:
            rows.append((run.name, fingerprint, found))
    fingerprints = {name: {other for n, other, _ in rows if n == name} for name, _, _ in rows}
    return [(f"{n} {mark[:8]}" if len(fingerprints[n]) > 1 else n, found) for n, mark, found in rows]


def _kind(result: TaskResult) -> tuple[str, int]:
    """What must agree before two results of a task may be compared, but for the shots."""
    return result.version, result.samples


def _cell(result: TaskResult | None, metric: str, differ: AbstractSet[str], shots: int = 0) -> str:
    if result is None:
        return ""
    text = str(result.scores.get(metric) or result.scores[result.headline])
    notes = [] if result.shots == shots else [f"{result.shots}-shot"]
    if result.task in differ:
        notes.append(f"version {result.version}, {result.samples:,} questions")
    return f"{text} ({', '.join(notes)})" if notes else text
