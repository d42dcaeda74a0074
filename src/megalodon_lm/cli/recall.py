"""megalodon evaluate recall"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import InputError
from .options import Quiet

if TYPE_CHECKING:
    from ..evaluation.recall_trials import Trial
    from ..evaluation.recall_zero_shot import ProseTrial

PROSE = ("passkey", "needle", "needles")


class _Report(NamedTuple):
    """What finished trials say together."""

    figures: dict[str, Any]
    drawings: tuple[Callable[[Path], None], ...]
    """One for each picture."""
    table: Any


@dataclass
class Recall(Quiet):
    """Recall: does a model know, some chunks later, what it read?

    Architectures learn a task from scratch (mqar, copying, induction), or trained models are asked as they are in prose
    (passkey, needle, needles); docs/long-context.md says what the sequences are. A trial that is finished has a file in
    --out: the same command goes on where it was interrupted, and several processes may share the folder, with other
    --seeds, say. With several --learning-rates the table shows each architecture's best, chosen on sequences that are
    used for nothing else.
    """

    task: list[Literal["mqar", "copying", "induction", "passkey", "needle", "needles"]] = field(
        default_factory=lambda: ["mqar"]
    )
    """Learnt: associative recall of many pairs, selective copying, induction. Asked in prose: a number, a sentence, one
    of several sentences."""
    question: list[Literal["after", "before"]] = field(default_factory=lambda: ["after"])
    """Whether the model is told what it will be asked for after the content that holds the answer, or before it."""
    pairs: list[int] = field(default_factory=list)
    """Keys and values in a sequence, of needles the sentences; each number is a task of its own. Nothing for 8 and 32,
    and for 4 needles."""
    chunk_size: int = 0
    """Tokens, the unit of distance, whatever chunks a model has; 0 for 64, in prose 256."""
    distances: list[int] = field(default_factory=lambda: [0, 1, 4, 16, 64])
    """Chunks between content and answer, to test; 0 for the same chunk, where both fit into one."""
    sequences: int = 0
    """To test with, of each distance; 0 for 256, in prose for 16, each of them read with eight different answers."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Of weights and sequences."""
    out: Path = Path("runs/recall")
    """Folder of the trials, with recall.json and pictures of all that were asked for."""
    finished: bool = False
    """Train and ask nothing: show what --out holds of all this."""
    precision: Literal["auto", "bf16", "float32"] = "float32"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    device: str = "cpu"
    """cpu or cuda."""
    trained: list[str] = field(default_factory=list)
    """In prose: run folders or saved models, each as FOLDER or as NAME=FOLDER. With --finished none is opened."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.5])
    """In prose: the part of it that stands before the needle."""
    model: str = "tiny"
    """Learnt: a named size, a configuration file or a model folder, of which the sizes are taken; its vocabulary is the
    task's."""
    architectures: list[str] = field(default_factory=lambda: ["megalodon", "sliding", "memory", "gecko"])
    """To compare: the model as it is, with attention over the chunk before alone, the adaptive memory alone, or with
    all of Gecko's choices; or other architectures, such as llama, with as many layers and parameters and the same
    chunks. Nothing for the model alone, whatever it is."""
    set: list[str] = field(default_factory=list)
    """Changes to the model, such as model_dim=128, or to a single contender, such as llama.window=256; values as in
    TOML."""
    train_distances: list[int] = field(default_factory=lambda: [0, 1, 2, 4])
    """Those of the sequences that are learnt from, a step of one of them; the longer ones join in later."""
    steps: int = 2000
    """Of training."""
    batch_size: int = 32
    """Sequences in a step."""
    learning_rates: list[float] = field(default_factory=lambda: [8e-3])
    """At the peak: warm-up over the first tenth of the steps, then a cosine."""
    optimizers: list[Literal["adamw", "muon"]] = field(default_factory=lambda: ["adamw"])
    """To try at each rate: AdamW, or Muon for the matrices and AdamW for the rest, both at that rate."""
    weight_decay: float = 0.03
    """Decoupled, on every weight."""

    def run(self) -> None:
        """Carry out the command."""
        from ..ops.device import choose_device

        device = choose_device(self.device)
        in_prose = [task in PROSE for task in self.task]
        if any(in_prose) != all(in_prose):
            raise InputError(f"--task {' '.join(self.task)}: {', '.join(PROSE)} are asked apart from those learnt")
        if any(in_prose) != bool(self.trained):
            raise InputError(f"--trained takes models for the tasks {', '.join(PROSE)}, and for no others")
        if any(in_prose):
            from ..evaluation.recall_zero_shot import find_all

            places = self._wanted(self._places())
            if not places:
                raise InputError("no sequences of these --distances and --depths; larger --chunk-size has room")

            def asked(move: Callable[..., None]) -> Iterator[Any]:
                return find_all(places, self.out, lambda number: move(number, places[number].title))

            self._follow(len(places), asked, ("recall.png", "depths.png"), _of_prose)
            return
        from ..evaluation.recall_trials import carry_out_all

        trials = self._wanted(self._trials())
        if not trials:
            raise InputError(
                "--task, --question, --optimizers, --learning-rates and --seeds need at least one value each"
            )

        def learnt(move: Callable[..., None]) -> Iterator[Any]:
            def watch(number: int, step: int, loss: float) -> None:
                note = f"{trials[number].title}: step {step:,} of {self.steps:,}, {loss:.3f} nats an answer"
                move(number + step / self.steps, note)

            return carry_out_all(trials, self.out, device, watch)

        self._follow(len(trials), learnt, ("recall.png", "pairs.png"), _of_learnt)

    def _follow(
        self,
        number: int,
        carry_out: Callable[[Callable[..., None]], Iterator[Any]],
        names: tuple[str, ...],
        report: Callable[[list[Any]], _Report],
    ) -> None:
        """Show trials as they are finished, and at the end, also of an interrupt, what they say together."""
        import json

        from ..files import FIGURES, PICTURE, check_writable, make_folder, write_atomically
        from .progress import console, progress_bar, results
        from .recall_tables import WIDTH

        make_folder(self.out)
        figures, *pictures = (self.out / name for name in ("recall.json", *names))
        for path in (figures, *pictures):
            check_writable(path, FIGURES if path is figures else PICTURE)
        finished: list[Any] = []
        try:
            with progress_bar("recall", number) as move:
                for result in carry_out(move):
                    finished.append(result)
                    move(len(finished))
                    console.print(f"{result.trial.title}: {result.said}")
        finally:
            if finished:
                said, drawings, table = report(finished)
                write_atomically(figures, json.dumps(said, indent=2) + "\n")
                for path, drawing in zip(pictures, drawings, strict=True):
                    drawing(path)
                results.print(table, width=max(results.width, WIDTH), crop=False)
        console.print(", ".join(map(str, (figures, *pictures))))

    def _wanted(self, trials: list[Any]) -> list[Any]:
        """All of them, or those that are finished."""
        if not self.finished or not trials:
            return trials
        found = [trial for trial in trials if (self.out / trial.file_name).exists()]
        if not found:
            raise InputError(f"{self.out} holds none of these {len(trials):,} trials; without --finished they are made")
        return found

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
                name, config, find_task(task, pairs, self.chunk_size or 64, question), tuple(self.train_distances),
                tuple(self.distances), self.sequences or 256,
                TrainingRecipe(
                    steps=self.steps, batch_size=self.batch_size, learning_rate=rate, warmup_steps=self.steps // 10,
                    weight_decay=self.weight_decay, precision=self.precision, seed=seed, optimizer=optimizer,
                    matrix_learning_rate=rate,
                ),
            )
            for task in self.task
            for question in self.question
            for pairs in self.pairs or [8, 32]
            for name, config in compared.items()
            for optimizer in self.optimizers
            for rate in self.learning_rates
            for seed in self.seeds
        ]  # fmt: skip

    def _places(self) -> "list[ProseTrial]":
        from ..data.books import bundled
        from ..evaluation.recall_prose import Prose, ProseTask
        from ..evaluation.recall_zero_shot import ProseTrial
        from .models import load_trained

        folders = _named(self.trained)
        found = []
        for name, folder in folders.items():
            model, prose = None, None
            if not self.finished:
                model, tokenizer = load_trained(folder, self.device)
                prose = Prose(bundled("validation").values(), tokenizer)
            found += [
                ProseTrial(name, model, task, distance, depth, self.sequences or 16, seed, self.precision)
                for kind in self.task
                for number in (self.pairs or [4] if kind == "needles" else [1])
                for question in self.question
                for task in [ProseTask(kind, prose, self.chunk_size or 256, number, question)]
                for distance in sorted(set(self.distances))
                for depth in sorted(set(self.depths))
                for seed in self.seeds
                if prose is None or not 0 <= depth < 1 or task.fits(distance, depth)
            ]
        return found


def _named(trained: list[str]) -> dict[str, Path]:
    """Folders of models by the names that tell their results apart."""
    named: dict[str, Path] = {}
    for each in trained:
        name, given, folder = each.partition("=")
        if not given or Path(each).exists():
            name, folder = Path(each).resolve().name, each
        if not name or {"/", "\\"} & set(name):
            raise InputError(f"--trained {each}: NAME=FOLDER needs a name, and a name has no slashes")
        if name in named:
            raise InputError(f"--trained: results are told apart by name, and {name!r} comes twice; write NAME=FOLDER")
        named[name] = Path(folder)
    return named


def _of_learnt(finished: list[Any]) -> _Report:
    from ..evaluation.recall_report import draw, draw_pairs, summarise
    from .recall_tables import learnt

    summaries = summarise(finished)
    figures = {"summary": [s.figures() for s in summaries], "trials": [r.figures() for r in finished]}
    return _Report(
        figures, (partial(draw, summaries=summaries), partial(draw_pairs, summaries=summaries)), learnt(summaries)
    )


def _of_prose(finished: list[Any]) -> _Report:
    from ..evaluation.recall_prose_report import by_reader, draw, draw_depths
    from .recall_tables import in_prose

    readers = by_reader(finished)
    drawings = (partial(draw, readers=readers), partial(draw_depths, readers=readers))
    return _Report({"trials": [f.figures() for f in finished]}, drawings, in_prose(readers))
