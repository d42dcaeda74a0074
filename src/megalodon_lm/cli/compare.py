"""megalodon compare"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from .options import Quiet

if TYPE_CHECKING:
    from ..evaluation.comparison_standings import Standing

TABLE_WIDTH = 160


@dataclass
class Compare(Quiet):
    """Train several models on the same tokens in the same order, and compare them.

    A recipe with a table [compare] says whom: architectures at equal parameters, or choices of one. Each contender is
    trained at the learning rate that suits it, which shorter runs find. A run that is finished stays in --out: the same
    command goes on where it was interrupted or killed, and processes with other --only may share the folder.
    docs/comparison.md tells how to read what comes out.
    """

    recipe: Positional[Path]
    """A TOML file, or the name of a recipe in the package, such as compare_architectures."""
    out: Path | None = None
    """Folder of the runs; the default is runs/ and the recipe's name."""
    only: list[str] = field(default_factory=list)
    """Contenders to train now, or with --report to show beside the base; nothing for all."""
    report: Path | None = None
    """Train nothing; write the tables and pictures of what --out holds into this folder. Without it they are written
    into the folder report of --out at the end."""
    json: Path | None = None
    """Write all figures to this file too."""
    set: list[str] = field(default_factory=list)
    """Changes to the recipe, such as training.steps=2000 compare.seeds=3; values as in TOML."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        import json

        from ..evaluation.comparison import Comparison
        from ..evaluation.comparison_report import PAGE_FILE, figures, write
        from ..evaluation.comparison_runs import carry_out_all
        from ..evaluation.comparison_speeds import measure_speeds
        from ..evaluation.comparison_standings import gather
        from ..files import FIGURES, check_writable, write_atomically
        from ..ops.device import choose_device
        from .progress import console
        from .training import train_with_progress

        comparison = Comparison.load(self.recipe, self.set)
        out = self.out or Path("runs") / self.recipe.stem
        if self.json is not None:
            check_writable(self.json, FIGURES)
        names, device = comparison.choose(self.only), choose_device(self.device)
        if self.report is None:
            for result in carry_out_all(
                comparison, out, names, device, lambda trainer: train_with_progress(trainer)[0], console.print
            ):
                console.print(f"{result.contender}: {result.validation:.4f} bits per byte on the validation text")
            if not any(s.missing for s in gather(comparison, out)):
                measure_speeds(comparison, out, device, console.print)
        shown = comparison if self.report is None else comparison.of(names)
        standings = gather(shown, out)
        folder = self.report or out / "report"
        write(shown, out, standings, folder)
        self._show(standings)
        if self.json is not None:
            write_atomically(self.json, json.dumps(figures(shown, standings), indent=1) + "\n")
        for title in (title for s in standings for title in s.missing):
            console.print(f"not finished: {title}")
        print(folder / PAGE_FILE)

    def _show(self, standings: "list[Standing]") -> None:
        from rich.table import Table

        from ..evaluation.comparison_report import tables
        from .progress import results

        for table in tables(standings):
            shown = Table(title=table.title, caption=table.note)
            for number, column in enumerate(table.columns):
                shown.add_column(column, justify="right" if number else "left")
            for row in table.rows:
                shown.add_row(*row)
            results.print(shown, width=max(results.width, TABLE_WIDTH), crop=False)
