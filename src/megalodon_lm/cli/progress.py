"""Progress bars: what is done, the speed, and the time left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)


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
                console.print(f"{title}: {10 * tenths} % {note}", highlight=False)

        yield move
