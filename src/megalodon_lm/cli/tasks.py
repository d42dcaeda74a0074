"""megalodon evaluate tasks, and megalodon evaluate report"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from ..errors import InputError
from .options import Quiet

if TYPE_CHECKING:
    from ..evaluation.results import Results

COLUMNS = ("task", "metric", "score", "shots", "questions", "minutes", "tokens computed", "of tokens reread")

MOST_COLUMNS = 14  # the model, and every task that has published scores


@dataclass
class Tasks(Quiet):
    """Tasks of lm-evaluation-harness: MMLU, WinoGrande and all others that it defines.

    Prompts, choices and metrics are the harness's own. What prompts begin with in common is read once. Needs pip
    install 'megalodon-lm[eval]'.
    """

    tasks: Positional[str]
    """Names with commas between them: mmlu, boolq, hellaswag, piqa, siqa, winogrande, arc_easy, arc_challenge, nq_open
    and triviaqa, for all of which paper stands, lambada, and whatever else the harness knows."""
    model: Positional[Path]
    """A run folder, a saved model, a folder of transformers, or a GGUF file."""
    shots: int | None = None
    """Solved examples in each prompt; nothing for 5 in mmlu, nq_open and triviaqa, as the paper's table has it, and 0
    elsewhere."""
    limit: int | None = None
    """Questions of each task, and of each subject of mmlu; nothing for all."""
    data: Path | None = None
    """Folder of local copies, docs/evaluation.md says how they may lie in it; nothing is asked of the network then."""
    out: Path | None = None
    """Write the results to this file (JSON), for megalodon evaluate report."""
    name: str | None = None
    """Of the model in tables; nothing for that of its folder."""
    chat: bool = False
    """Put each question as a turn of a chat."""
    begin: Literal["auto", "yes", "no"] = "auto"
    """Put the begin token before every prompt; auto for as the model was trained: with it here, elsewhere as its
    tokenizer does."""
    seed: int = 1234
    """Of the solved examples that are drawn, and of texts where a task wants them drawn at random."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        for option, value, least in (("--shots", self.shots, 0), ("--limit", self.limit, 1)):
            if value is not None and value < least:
                raise InputError(f"{option} {value} must be at least {least}")
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's own bars
        if self.data is not None:
            os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        try:
            import lm_eval  # noqa: F401
        except ImportError:
            raise InputError("tasks need lm-eval; pip install 'megalodon-lm[eval]'") from None
        import torch

        from ..evaluation.harness import HarnessModel
        from ..evaluation.results import Results, identify
        from ..evaluation.short_tasks import ask
        from ..evaluation.task_definitions import Definitions
        from ..files import RESULTS, check_writable
        from ..training.precision import choose_precision
        from .models import load_readable
        from .progress import console, progress_bar, results

        if self.out is not None:
            check_writable(self.out, RESULTS)
        definitions = Definitions([name for name in self.tasks.split(",") if name], self.data)
        model, tokenizer = load_readable(self.model, self.device)
        precision = choose_precision(self.precision, torch.device(self.device))
        begin = tokenizer.begins if self.begin == "auto" else self.begin == "yes"
        settings = {
            "seed": self.seed, "limit": self.limit, "precision": precision, "chat": self.chat, "begin": begin,
        }  # fmt: skip
        made = Results(self.name or self.model.resolve().name, identify(model, tokenizer), settings, [])
        with progress_bar("tasks", len(definitions.names)) as move:

            def watch(done: int, total: int) -> None:
                move(len(made.tasks) + done / total, f"{done:,} of {total:,} requests")

            lm = HarnessModel(model, tokenizer, precision, begin, watch, self.seed)
            for found in ask(lm, definitions, self.shots, self.limit, self.seed, self.chat):
                made.tasks.append(found)
                move(len(made.tasks), found.task)
                if left := found.notes.get("left out"):
                    console.print(f"{found.task}: {len(left)} parts have no local copy and are left out")
                if cut := found.notes.get("cut at the window"):
                    console.print(
                        f"{found.task}: {cut['tokens']:,} tokens of {cut['requests']:,} requests had no room in the "
                        "model's window and were left out"
                    )
                if self.out is not None:
                    made.save(self.out)
        results.print(_table(made))


@dataclass
class Report:
    """Results of several models in one table, under published ones of the same tasks."""

    results: Positional[list[Path]]
    """Files that --out of an evaluation wrote."""

    def run(self) -> None:
        """Carry out the command."""
        from rich.table import Table

        from ..evaluation.results import Results
        from ..evaluation.results_table import table
        from .progress import results

        if not self.results:
            raise InputError("name at least one file of results")
        made = table([Results.load(path) for path in self.results])
        lines = [made.columns, *made.rows]
        if len(made.columns) > MOST_COLUMNS:  # of many tasks, a row each
            lines = [list(line) for line in zip(*lines, strict=True)]
        shown = Table(*lines[0], caption=f"Percent. Published: {made.source}", caption_justify="left")
        for row in lines[1:]:
            shown.add_row(*row)
        results.print(shown)


def _table(made: "Results") -> "object":
    from rich.table import Table

    table = Table(*COLUMNS, title=made.name)
    for found in made.tasks:
        for number, (metric, score) in enumerate(found.scores.items()):
            more = () if number else (
                str(found.shots), f"{found.samples:,}", f"{found.seconds / 60:.1f}", f"{found.tokens_computed:,}",
                f"{found.tokens_reread:,}, {found.tokens_reread / max(1, found.tokens_computed):.1f} times",
            )  # fmt: skip
            table.add_row("" if number else found.task, metric, str(score), *more)
    return table
