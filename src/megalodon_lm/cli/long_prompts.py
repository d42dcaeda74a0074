"""megalodon evaluate long"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from ..errors import InputError
from .options import Quiet

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation.results import TaskResult

COLUMNS = ("task", "length", "question", "depth", "in the text", "95 %", "chosen of 8", "95 %")


@dataclass
class Long(Quiet):
    """Long prompts from seeds, in the manner of RULER: needles, variables, common words, questions of two hops.

    They stand in real prose, in documents of any length. Each document is read once for all its questions. What counts
    is how many of the answers the written text contains, and, where there are choices, how often the right one of eight
    is the likeliest.
    """

    model: Positional[Path]
    """A run folder, a saved model, or whatever megalodon evaluate tasks reads."""
    tasks: list[str] = field(
        default_factory=lambda: [
            "needle", "multi-key", "multi-value", "multi-query", "variables", "common-words", "frequent-words",
            "two-hops",
        ]
    )  # fmt: skip
    """Kinds of prompts."""
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16_384])
    """Tokens of a document; up to a million and beyond."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Parts of a document before what is asked for: of needle, multi-key and two-hops."""
    question: list[Literal["after", "before"]] = field(default_factory=lambda: ["after"])
    """Where the question stands, after the document or before it."""
    samples: int = 4
    """Documents of each kind and length; of needle, for each depth."""
    seed: int = 0
    """Of everything that is drawn."""
    text: list[str] = field(default_factory=lambda: ["bundled:validation"])
    """Prose: files and folders, as for megalodon prepare, or bundled:validation (Dracula); repeated where a document is
    longer."""
    out: Path | None = None
    """Write the results to this file (JSON), with those by depth, for megalodon evaluate report."""
    name: str | None = None
    """Of the model in tables; nothing for that of its folder."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        import torch
        from rich.table import Table

        from ..data.corpus import Texts, texts_of
        from ..evaluation.long_prompts_run import LongRun
        from ..evaluation.read_once import Reader
        from ..evaluation.recall_prose import Prose
        from ..evaluation.results import Results, identify
        from ..files import RESULTS, check_writable
        from ..training.precision import choose_precision
        from .models import load_readable
        from .progress import progress_bar, results

        if self.out is not None:
            check_writable(self.out, RESULTS)
        model, tokenizer = load_readable(self.model, self.device)
        prose = Prose((b"".join(blocks) for blocks in texts_of(Texts(self.text, "once"))), tokenizer)
        runs = [
            LongRun(task, prose, length, tuple(self.depths), self.samples, self.seed, question)
            for task in self.tasks
            for question in self.question
            for length in self.lengths
        ]
        if not runs:
            raise InputError("--tasks, --lengths and --question need at least one value each")
        precision = choose_precision(self.precision, torch.device(self.device))
        reader = Reader(model, tokenizer, precision)
        settings = {"seed": self.seed, "samples": self.samples, "text": self.text, "precision": precision}
        made = Results(self.name or self.model.resolve().name, identify(model, tokenizer), settings, [])
        table = Table(*COLUMNS)
        with progress_bar("long prompts", sum(run.length * run.samples for run in runs)) as move:
            done = 0
            for run in runs:

                def watch(samples: int, run: LongRun = run, done: int = done) -> None:
                    move(done + samples * run.length, f"{run.task} {run.length:,}")

                found = run.result(reader, watch)
                done += run.length * run.samples
                made.tasks.append(found)
                _add_rows(table, run.task, found)
                if self.out is not None:
                    made.save(self.out)
        results.print(table)
        computed, anew = (sum(getattr(t, name) for t in made.tasks) for name in ("tokens_computed", "tokens_reread"))
        results.print(f"{computed:,} tokens computed; {anew:,} with every prompt read anew for each answer and choice")


def _add_rows(table: "Table", task: str, found: "TaskResult") -> None:
    """A row for each depth."""
    for place in found.notes["depths"]:
        cells = []
        for name in ("contained", "chosen"):
            if tally := place.get(name):
                low, high = tally["interval"]
                cells += [f"{tally['right']} of {tally['of']}", f"{100 * low:.0f} to {100 * high:.0f} %"]
        depth = "" if place["depth"] is None else f"{place['depth']:g}"
        table.add_row(task, f"{found.notes['length']:,}", found.notes["question"], depth, *cells)
