"""What commands show: results on standard output, progress and remarks on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

UNBROKEN = 10_000  # columns where no terminal is: lines are for programs then


class _Console(Console):
    """Text is shown as it is: a path in brackets is no markup."""

    def __init__(self, stderr: bool):
        terminal = (sys.stderr if stderr else sys.stdout).isatty()
        width = None if terminal else UNBROKEN
        super().__init__(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """Leave it to whoever called, where the library would end the process."""
        raise


console, results = _Console(stderr=True), _Console(stderr=False)


class _Note(ProgressColumn):
    def render(self, task: Any) -> Text:
        return Text(task.fields.get("note", ""), style="cyan")


@contextmanager
def progress_bar(title: str, total: float | None) -> Iterator[Any]:
    """A bar; call it with (done, note) to move it.

    Without a terminal, a line is printed for every tenth of the way, if the total is known.
    """
    columns = (TextColumn(title), BarColumn(30), TaskProgressColumn(), TimeRemainingColumn(), _Note())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        tenths = 0

        def move(done: float, note: str = "") -> None:
            nonlocal tenths
            bar.update(task, completed=done, note=note)
            reached = int(10 * done / total) if total else 0
            if not console.is_terminal and reached > tenths:
                tenths = reached
                console.print(f"{title}: {10 * tenths} % {note}")

        yield move
