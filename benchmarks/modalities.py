"""What small encoders reach on sound, pictures and expressions, Megalodon's average beside MEGA's real-valued one.

    OMP_NUM_THREADS=1 python benchmarks/modalities.py --data DIR --out runs/modalities --docs docs/modalities.md

Trains seven recipes twice each, one after the other, by `megalodon classify train`: DIR holds what they name (fsdd/,
mnist/, cifar10_gray/, listops/). Ctrl-C leaves a checkpoint; the same command goes on, and passes over what is
finished.
The table is of the last weights of each run, none chosen by what they are measured on.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from megalodon_lm.files import write_atomically
from megalodon_lm.model.encoder_config import EncoderConfig
from megalodon_lm.training.metrics import read_metrics

TASKS = {
    "digits": ("classify_digits", "spoken digits, 8 kHz samples, recordings 35-39", 0.93),
    "mnist": ("classify_mnist", "MNIST pixel by pixel, 7,000 to learn from", 0.95),
    "cifar": ("classify_cifar", "CIFAR-10 in grey patches of 2 x 2, 8,000 to learn from", 0.5),
    "pixels": ("classify_cifar_pixels", "CIFAR-10 in grey, pixel by pixel, 8,000 to learn from", 0.5),
    "listops": ("classify_listops_short", "ListOps of depth 20, the authors' file", 0.6),
    "pathfinder": ("classify_pathfinder_small", "Pathfinder 32 x 32, 6 dashes", 0.7),
    "dashes": ("classify_pathfinder_14", "Pathfinder 32 x 32, 14 dashes", 0.7),
}
"""Recipe, what it is, and the accuracy to reach."""
AVERAGES = {"complex": "Megalodon (CEMA)", "real": "MEGA (EMA)"}
BEGIN, END = "<!-- table of benchmarks/modalities.py -->", "<!-- end -->"


@dataclass
class Modalities:
    """See the head of the file."""

    data: Path
    """The folder that the recipes' sources are in."""
    out: Path
    """Run folders go here, and results.json."""
    only: list[str] = field(default_factory=list)
    """Some of the tasks, by name; empty for all."""
    averages: list[str] = field(default_factory=lambda: list(AVERAGES))
    """complex, real."""
    set: list[str] = field(default_factory=list)
    """Changes to the recipes, as for megalodon classify train."""
    docs: Path | None = None
    """A page whose table, between two comments, is replaced."""

    def run(self) -> None:
        """Train what is not finished, then show all that is."""
        for task in self.only or TASKS:
            for average in self.averages:
                folder = self.out.absolute() / f"{task}-{average}"
                if not (folder / "classification.json").exists():
                    self._train(TASKS[task][0], average, folder)
                self._show()

    def _train(self, recipe: str, average: str, folder: Path) -> None:
        command = [sys.executable, "-m", "megalodon_lm", "classify", "train", recipe, "--out", str(folder)]
        command += ["--resume", "auto", "--set", f"model.cema={average}", *self.set]
        with subprocess.Popen(command, cwd=self.data) as training:
            try:
                training.wait()
            except KeyboardInterrupt:  # it got that too, and leaves a checkpoint
                training.wait()
                sys.exit(130)
        if training.returncode:
            sys.exit(training.returncode)

    def _show(self) -> None:
        results = self._results()
        write_atomically(self.out / "results.json", json.dumps(results, indent=2) + "\n")
        table = Table("task", "wanted", *AVERAGES.values())
        for row in rows(results):
            table.add_row(*row)
        Console().print(table)
        if self.docs:
            text = self.docs.read_text(encoding="utf-8")
            before, _, rest = text.partition(BEGIN)
            if END not in rest:
                sys.exit(f"{self.docs} has no lines {BEGIN} and {END} to put the table between")
            write_atomically(self.docs, before + BEGIN + "\n" + markdown(results) + END + rest.partition(END)[2])

    def _results(self) -> dict[str, Any]:
        found: dict[str, Any] = {"runs": {}}
        for task in TASKS:
            for average in AVERAGES:
                folder = self.out / f"{task}-{average}"
                if (folder / "classification.json").exists():
                    figures = json.loads((folder / "classification.json").read_text())
                    last = read_metrics(folder)[-1]
                    found["runs"][f"{task}-{average}"] = {
                        **{key: figures[key] for key in ("accuracy", "interval", "examples", "loss")},
                        "steps": last["step"], "minutes": last["seconds"] / 60,
                        "parameters": EncoderConfig.load(folder / "config.json").num_parameters,
                    }  # fmt: skip
        return found


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Of the table: the task, what is wanted, and for each average the accuracy and its interval."""
    made = []
    for task, (_, what, wanted) in TASKS.items():
        if not any(f"{task}-{average}" in results["runs"] for average in AVERAGES):
            continue
        row = [what, f"{wanted:.0%}"]
        for average in AVERAGES:
            run = results["runs"].get(f"{task}-{average}")
            row.append("" if run is None else "{:.2%} ({:.1%} to {:.1%})".format(run["accuracy"], *run["interval"]))
        made.append(row)
    return made


def markdown(results: dict[str, Any]) -> str:
    """The same as a table of a page."""
    lines = ["| | wanted | " + " | ".join(AVERAGES.values()) + " |", "|---" * (2 + len(AVERAGES)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(results))]) + "\n"


if __name__ == "__main__":
    tyro.cli(Modalities).run()
