"""megalodon evaluate"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, subcommand

from ..errors import InputError
from .options import Quiet

if TYPE_CHECKING:
    from ..evaluation.by_context import Curve
    from ..evaluation.recall_report import Summary

TABLE_WIDTH = 160


@dataclass
class Perplexity(Quiet):
    """Loss and bits per byte of a text, by how far back the model may look.

    The text, of any size, is read once for each context, with the state emptied every so many tokens, in constant
    memory. Longer contexts should be no worse. Of several texts each is read by itself.
    """

    model: Positional[Path]
    """A run folder or a saved model."""
    text: Positional[list[str]] = field(default_factory=lambda: ["bundled:validation"])
    """Files and folders, as for megalodon prepare, - for standard input, or bundled:validation (Dracula)."""
    contexts: list[int] = field(default_factory=lambda: [64, 1024, 4096, 16_384, 65_536, 0])
    """Tokens of context; 0 for a whole text."""
    norm_statistics: Literal["cumulative", "windowed", "both"] = "cumulative"
    """Of the timestep norms: cumulative, as the model was trained; windowed, of the last chunks, as the Megalodon
    authors evaluate long texts, at about four times the cost; or one after the other."""
    window_first: int = 8
    """Windowed: chunks before the statistics are replaced for the first time."""
    window_every: int = 2
    """Windowed: chunks from one replacement to the next."""
    window_length: int = 6
    """Windowed: chunks the statistics are taken from."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    json: Path | None = None
    """Write the figures to this file."""
    plot: Path | None = None
    """Draw them into this file (.png, .svg, .pdf)."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        import json

        import torch

        from ..data.corpus import Texts, texts_of
        from ..evaluation.by_context import draw, measure
        from ..evaluation.norm_statistics import NormSchedule
        from ..evaluation.perplexity import Losses
        from ..files import FIGURES, PICTURE, check_writable, write_atomically
        from ..training.precision import choose_precision
        from .models import load_trained
        from .progress import progress_bar, results

        for context in self.contexts:
            if context < 0:
                raise InputError(f"--contexts {context} must be at least 0; 0 means the whole text")
        if not self.contexts:
            raise InputError("--contexts needs at least one length; 0 means the whole text")
        windowed = NormSchedule(self.window_first, self.window_every, self.window_length)
        schedules: list[NormSchedule | None] = [] if self.norm_statistics == "windowed" else [None]
        if self.norm_statistics != "cumulative":
            schedules.append(windowed)
        for path, kind in ((self.json, FIGURES), (self.plot, PICTURE)):
            if path is not None:
                check_writable(path, kind)
        texts = Texts(self.text, "kept")
        assert texts.num_bytes is not None
        model, tokenizer = load_trained(self.model, self.device)
        precision = choose_precision(self.precision, torch.device(self.device))
        curves = []
        for schedule in schedules:
            title = f"{'windowed' if schedule else 'cumulative'} norm statistics"
            with progress_bar(title, len(set(self.contexts)) * texts.num_bytes) as move:
                finished: list[int] = []  # contexts

                def read(finished: list[int] = finished) -> Iterator[Iterator[bytes]]:
                    yield from texts_of(texts)
                    finished.append(texts.num_bytes or 0)

                def watch(context: int, losses: Losses, move: Any = move, finished: list[int] = finished) -> None:
                    move(sum(finished) + texts.done, f"context {context or 'whole text'}: {losses.mean:.3f} nats")

                curves.append(measure(model, read, tokenizer, self.contexts, precision, schedule, watch))
        num_bytes = curves[0].num_bytes
        results.print(f"{num_bytes:,} bytes, {precision}")
        for curve in curves:
            self._show(curve)
        if self.json is not None:
            figures = {"bytes": num_bytes, "precision": precision} | {c.norm_statistics: c.figures() for c in curves}
            write_atomically(self.json, json.dumps(figures, indent=2) + "\n")
        if self.plot is not None:
            draw(self.plot, curves)

    def _show(self, curve: "Curve") -> None:
        from rich.table import Table

        from .progress import results

        columns = ("context", "bits per byte", "change", "perplexity of a token")
        table = Table(*columns, title=f"{curve.norm_statistics} norm statistics")
        shorter = None
        for (context, bits), losses in zip(curve.bits_per_byte.items(), curve.losses.values(), strict=True):
            change = "" if shorter is None else f"{bits - shorter:+.4f}"
            table.add_row(f"{context:,}", f"{bits:.4f}", change, f"{losses.perplexity:.4f}")
            shorter = bits
        results.print(table)
        if len(curve.losses) > 1:
            results.print(curve.verdict)
        table = Table("position up to", "bits per token")
        for position, value in curve.longest.by_position().items():
            table.add_row(f"{position:,}", f"{value:.4f}")
        results.print(table)


@dataclass
class Compressors:
    """Bits per byte of gzip, xz and bzip2 on a text: what a model has to beat."""

    text: Positional[list[str]] = field(default_factory=lambda: ["bundled:validation"])
    """Files and folders, as for megalodon prepare, - for standard input, or bundled:validation (Dracula)."""

    def run(self) -> None:
        """Carry out the command."""
        from ..data.corpus import Texts
        from ..evaluation.compressors import compressors

        for name, value in compressors(block for text in Texts(self.text, "once") for block in text.blocks).items():
            print(f"{name:<6} {value:.4f} bits per byte")


@dataclass
class Recall(Quiet):
    """Associative recall (MQAR): models trained from scratch to say which value went with which key, some chunks later.

    Each variant of the model learns from fresh sequences and is then asked at each distance; docs/long-context.md says
    what the sequences are. A trial that is finished has a file in --out: the same command goes on where it was
    interrupted, and several processes may share the folder, with other --seeds, say. With several --learning-rates the
    table shows each variant's best.
    """

    model: str = "tiny"
    """A named size, a configuration file or a model folder, of which the sizes are taken; its vocabulary is the
    task's."""
    variants: list[str] = field(default_factory=lambda: ["megalodon", "sliding", "memory", "gecko"])
    """Choices of the model to compare: attention over the chunk before alone, the adaptive memory alone, or all of
    Gecko's choices; nothing for the model as it is."""
    set: list[str] = field(default_factory=list)
    """Changes to the configuration of all of them, such as model_dim=128 chunk_size=32; values as in TOML."""
    pairs: list[int] = field(default_factory=lambda: [8, 32])
    """Keys and values in a sequence; each number is a task of its own."""
    distances: list[int] = field(default_factory=lambda: [0, 1, 4, 16, 64])
    """Chunks between a key and its query, to test; 0 for the same chunk, where three tokens a pair fit into one."""
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
    """Folder of the trials, with recall.json and recall.png of all that were asked for."""
    precision: Literal["auto", "bf16", "float32"] = "float32"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        import json

        from ..config import ModelConfig
        from ..evaluation.recall_report import draw, summarise
        from ..evaluation.recall_trials import Result, Trial, carry_out_all, vary
        from ..files import FIGURES, PICTURE, check_writable, make_folder, write_atomically
        from ..ops.device import choose_device
        from ..tables import parse_changes
        from ..training.recipe import TrainingRecipe
        from .models import find_config
        from .progress import console, progress_bar

        base = ModelConfig.from_dict(find_config(self.model).to_dict() | parse_changes(self.set))
        trials = [
            Trial(
                name, config, pairs, tuple(self.train_distances), tuple(self.distances), self.sequences,
                TrainingRecipe(
                    steps=self.steps, batch_size=self.batch_size, learning_rate=rate, warmup_steps=self.steps // 10,
                    weight_decay=self.weight_decay, precision=self.precision, seed=seed,
                ),
            )
            for pairs in self.pairs
            for name, config in vary(base, self.variants, Path(self.model).stem).items()
            for rate in self.learning_rates
            for seed in self.seeds
        ]  # fmt: skip
        if not trials:
            raise InputError("--pairs, --learning-rates and --seeds need at least one number each")
        device = choose_device(self.device)
        make_folder(self.out)
        figures, plot = self.out / "recall.json", self.out / "recall.png"
        check_writable(figures, FIGURES)
        check_writable(plot, PICTURE)
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
                draw(plot, summaries)
                self._show(summaries)
        console.print(f"{figures}, {plot}")

    def _show(self, summaries: "list[Summary]") -> None:
        from rich.table import Table

        from ..evaluation.recall import SYMBOLS
        from .progress import results

        distances = sorted({distance for s in summaries for distance in s.by_distance})
        guesses = ", ".join(f"{1 / pairs:.1%} of {pairs}" for pairs in dict.fromkeys(s.pairs for s in summaries))
        table = Table(
            title="Values recalled, by chunks between key and query",
            caption=f"guessing gives {guesses} among the values seen, {1 / SYMBOLS:.1%} among all; state: bytes that "
            "are answered from at the last distance, and of the whole as it lies in memory",
        )
        for column in ("variant", "pairs", "rate", "seeds"):
            table.add_column(column)
        for column in (*map(str, distances), "state", "whole", "parameters", "seconds"):
            table.add_column(column, justify="right")
        for s in summaries:
            cells = (s.by_distance.get(distance) for distance in distances)
            table.add_row(
                s.name,
                str(s.pairs),
                f"{s.results[0].trial.training.learning_rate:g}",
                str(len(s.results)),
                *("" if cell is None else f"{cell[0]:.1%} ± {cell[1]:.1%}" for cell in cells),
                f"{list(s.state_bytes.values())[-1]:,}",
                f"{s.results[0].state_bytes:,}",
                f"{s.results[0].trial.config.num_parameters:,}",
                f"{sum(r.seconds for r in s.results) / len(s.results):,.0f}",
            )
        results.print(table, width=max(results.width, TABLE_WIDTH), crop=False)


@dataclass
class Evaluate:
    """Measure a trained model, or what models of a kind learn."""

    task: (
        Annotated[Perplexity, subcommand("perplexity")]
        | Annotated[Compressors, subcommand("compressors")]
        | Annotated[Recall, subcommand("recall")]
    )
    """What to measure."""

    def run(self) -> None:
        """Carry out the command."""
        self.task.run()
