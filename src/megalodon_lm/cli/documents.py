"""megalodon evaluate documents"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from ..errors import InputError
from .options import Quiet

if TYPE_CHECKING:
    from ..evaluation.documents import Document

COLUMNS = (
    "task", "metric", "score", "shots", "documents", "questions", "minutes", "tokens computed", "of tokens reread",
)  # fmt: skip


@dataclass
class Documents(Quiet):
    """Long documents: NarrativeQA, Qasper, QMSum, GovReport, SummScreen, QuALITY and ContractNLI of SCROLLS.

    Each document is read once, whole, and each of its questions goes on from there. For a model with a window, what
    comes before the question is cut to it, and the result says so. Needs pip install 'megalodon-lm[eval]'.
    """

    tasks: Positional[str]
    """Names with commas between them: narrativeqa, qasper, qmsum, govreport, summscreen, quality, contractnli, and
    fairytaleqa, which is none of SCROLLS."""
    model: Positional[Path]
    """A run folder, a saved model, or whatever megalodon evaluate tasks reads."""
    data: Path | None = None
    """Folder of local copies, docs/evaluation.md says how they may lie in it; nothing is asked of the network then."""
    shots: int | None = None
    """Solved examples before each document; nothing for 2 in qasper and 1 in qmsum, as the paper has it, and 0
    elsewhere."""
    limit: int | None = None
    """Documents of each task; nothing for all."""
    anew: bool = False
    """Read everything again for each question, as a check: the same result, for many times the work."""
    out: Path | None = None
    """Write the results to this file (JSON), for megalodon evaluate report."""
    answers: Path | None = None
    """Write the answers to this file (JSONL): task, id, what was said, its scores, log-likelihoods of the choices."""
    name: str | None = None
    """Of the model in tables; nothing for that of its folder."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        import json
        from dataclasses import asdict

        import torch
        from rich.table import Table

        from ..evaluation.documents import DocumentRun, find_task
        from ..evaluation.documents_data import load, solved_examples
        from ..evaluation.read_once import Reader
        from ..evaluation.results import Results, identify
        from ..files import ANSWERS, RESULTS, check_writable, write_atomically
        from ..training.precision import choose_precision
        from .models import load_readable
        from .progress import progress_bar, results

        for option, value, least in (("--shots", self.shots, 0), ("--limit", self.limit, 1)):
            if value is not None and value < least:
                raise InputError(f"{option} {value} must be at least {least}")
        tasks = [find_task(name) for name in self.tasks.split(",") if name]
        for path, kind in ((self.out, RESULTS), (self.answers, ANSWERS)):
            if path is not None:
                check_writable(path, kind)
        found = []
        for task in tasks:
            shots = task.shots if self.shots is None else self.shots
            found.append((task, load(task, self.data, self.limit), solved_examples(task, self.data, shots)))
        model, tokenizer = load_readable(self.model, self.device)
        precision = choose_precision(self.precision, torch.device(self.device))
        settings = {"limit": self.limit, "precision": precision, "anew": self.anew}
        made = Results(self.name or self.model.resolve().name, identify(model, tokenizer), settings, [])
        table, lines = Table(*COLUMNS), []
        for task, documents, examples in found:
            run = DocumentRun(task, Reader(model, tokenizer, precision), examples, self.anew)
            with progress_bar(task.name, sum(len(d.text) for d in documents)) as move:
                read = 0

                def watch(document: "Document", move: Any = move, run: DocumentRun = run) -> None:
                    nonlocal read
                    read += len(document.text)
                    move(read, f"{run.reader.work.computed:,} tokens computed")

                result, answers = run.result(documents, watch)
            made.tasks.append(result)
            lines += [json.dumps({"task": task.name} | asdict(answer)) + "\n" for answer in answers]
            score = result.scores[result.headline]
            error = "" if score.standard_error is None else f" ± {100 * score.standard_error:.1f}"
            table.add_row(
                task.name, result.headline, f"{100 * score.value:.1f}{error}", str(result.shots), str(len(documents)),
                str(result.samples), f"{result.seconds / 60:.1f}", f"{result.tokens_computed:,}",
                f"{result.tokens_reread:,}",
            )  # fmt: skip
            if self.out is not None:
                made.save(self.out)
            if self.answers is not None:
                write_atomically(self.answers, "".join(lines))
        results.print(table)
        for result in made.tasks:
            if (notes := result.notes).get("window"):
                results.print(
                    f"{result.task}: {notes['documents_cut']} of {notes['documents']} documents were cut at the "
                    f"model's window of {notes['window']:,} tokens; {notes['tokens_cut']:,} tokens in all"
                )
