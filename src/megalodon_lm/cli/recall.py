"""megalodon evaluate recall"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError
from .options import Quiet

if TYPE_CHECKING:
    from ..evaluation.recall_report import Summary
    from ..evaluation.recall_trials import Trial

TABLE_WIDTH = 180


@dataclass
class Recall(Quiet):
    """Recall: models trained from scratch to say, some chunks later, what they read.

    Each architecture learns from fresh sequences and is then asked at each distance; docs/long-context.md says what the
    sequences are. A trial that is finished has a file in --out: the same command goes on where it was interrupted, and
    several processes may share the folder, with other --seeds, say. With several --learning-rates the table shows each
    architecture's best, chosen on sequences that are used for nothing else.
    """

    task: list[Literal["mqar", "copying", "induction"]] = field(default_factory=lambda: ["mqar"])
    """Associative recall of many pairs, selective copying, induction."""
    question: list[Literal["after", "before"]] = field(default_factory=lambda: ["after"])
    """Whether the model is told what it will be asked for after the content that holds the answer, or before it."""
    model: str = "tiny"
    """A named size, a configuration file or a model folder, of which the sizes are taken; its vocabulary is the
    task's."""
    architectures: list[str] = field(default_factory=lambda: ["megalodon", "sliding", "memory", "gecko"])
    """To compare: the model as it is, with attention over the chunk before alone, the adaptive memory alone, or with
    all of Gecko's choices; or other architectures, such as llama, with as many layers and parameters. Nothing for the
    model alone, whatever it is."""
    set: list[str] = field(default_factory=list)
    """Changes to the model, such as model_dim=128, or to a single contender, such as llama.window=256; values as in
    TOML."""
    pairs: list[int] = field(default_factory=lambda: [8, 32])
    """Keys and values in a sequence; each number is a task of its own."""
    chunk_size: int = 64
    """Tokens, the unit of distance, whatever chunks a model has."""
    distances: list[int] = field(default_factory=lambda: [0, 1, 4, 16, 64])
    """Chunks between content and answer, to test; 0 for the same chunk, where both fit into one."""
    train_distances: list[int] = field(default_factory=lambda: [0, 1, 2, 4])
    """Those of the sequences that are learnt from, a step of one of them; the longer ones join in later."""
    steps: int = 2000
    """Of training."""
    batch_size: int = 32
    """Sequences in a step."""
    learning_rates: list[float] = field(default_factory=lambda: [8e-3])
    """At the peak: warm-up over the first tenth of the steps, then a cosine."""
    weight_decay: float = 0.03
    """Decoupled, on every weight."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Of weights and sequences."""
    sequences: int = 256
    """To test with, of each distance."""
    out: Path = Path("runs/recall")
    """Folder of the trials, with recall.json and pictures of all that were asked for."""
    precision: Literal["auto", "bf16", "float32"] = "float32"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        import json

        from ..evaluation.recall_report import draw, draw_pairs, summarise
        from ..evaluation.recall_trials import Result, carry_out_all
        from ..files import FIGURES, PICTURE, check_writable, make_folder, write_atomically
        from ..ops.device import choose_device
        from .progress import console, progress_bar

        trials = self._trials()
        if not trials:
            raise InputError("--task, --question, --pairs, --learning-rates and --seeds need at least one value each")
        device = choose_device(self.device)
        make_folder(self.out)
        figures, *pictures = (self.out / name for name in ("recall.json", "recall.png", "pairs.png"))
        for path in (figures, *pictures):
            check_writable(path, FIGURES if path is figures else PICTURE)
        finished: list[Result] = []
        try:
            with progress_bar("recall", len(trials)) as move:

                def watch(number: int, step: int, loss: float) -> None:
                    note = f"{trials[number].title}: step {step:,} of {self.steps:,}, {loss:.3f} nats an answer"
                    move(number + step / self.steps, note)

                for result in carry_out_all(trials, self.out, device, watch):
                    finished.append(result)
                    move(len(finished))
                    console.print(f"{result.trial.title}: {result.said}")
        finally:  # also when interrupted
            if finished:
                summaries = summarise(finished)
                said = {"summary": [s.figures() for s in summaries], "trials": [r.figures() for r in finished]}
                write_atomically(figures, json.dumps(said, indent=2) + "\n")
                for path, drawing in zip(pictures, (draw, draw_pairs), strict=True):
                    drawing(path, summaries)
                self._show(summaries)
        console.print(", ".join(map(str, (figures, *pictures))))

    def _trials(self) -> "list[Trial]":
        from ..architectures import config_of
        from ..evaluation.recall_tasks import find_task
        from ..evaluation.recall_trials import Trial, contenders
        from ..tables import parse_changes
        from ..training.recipe import TrainingRecipe
        from .models import find_config

        common: dict[str, Any] = {}
        own: dict[str, dict[str, Any]] = {}
        for key, value in parse_changes(self.set).items():
            name, dot, choice = key.rpartition(".")
            (own.setdefault(name, {}) if dot else common)[choice] = value
        base = config_of(find_config(self.model).to_dict() | common)
        compared = contenders(base, self.architectures, own, Path(self.model).stem)
        return [
            Trial(
                name, config, find_task(task, pairs, self.chunk_size, question), tuple(self.train_distances),
                tuple(self.distances), self.sequences,
                TrainingRecipe(
                    steps=self.steps, batch_size=self.batch_size, learning_rate=rate, warmup_steps=self.steps // 10,
                    weight_decay=self.weight_decay, precision=self.precision, seed=seed,
                ),
            )
            for task in self.task
            for question in self.question
            for pairs in self.pairs
            for name, config in compared.items()
            for rate in self.learning_rates
            for seed in self.seeds
        ]  # fmt: skip

    def _show(self, summaries: "list[Summary]") -> None:
        from rich.table import Table

        from .progress import results

        distances = sorted({distance for s in summaries for distance in s.by_distance})
        guesses = ", ".join(f"{t.chance:.1%} ({t.title})" for t in dict.fromkeys(s.task for s in summaries))
        table = Table(
            title="Answers that are right, by chunks between content and answer",
            caption=f"with the 95 % interval; guessing gives {guesses}; state: bytes that are answered from at the "
            "last distance, and of the whole as it lies in memory",
        )
        for column in ("architecture", "task", "rate", "seeds"):
            table.add_column(column)
        for column in (*map(str, distances), "state", "whole", "parameters", "seconds"):
            table.add_column(column, justify="right")
        for s in summaries:
            cells = (s.by_distance.get(distance) for distance in distances)
            table.add_row(
                s.name,
                s.task.title,
                f"{s.results[0].trial.training.learning_rate:g}",
                str(len(s.results)),
                *("" if cell is None else f"{cell.mean:.1%} ({cell.low:.1%}-{cell.high:.1%})" for cell in cells),
                f"{list(s.state_bytes.values())[-1]:,}",
                f"{s.results[0].state_bytes:,}",
                f"{s.results[0].trial.config.num_parameters:,}",
                f"{sum(r.seconds for r in s.results) / len(s.results):,.0f}",
            )
        results.print(table, width=max(results.width, TABLE_WIDTH), crop=False)
