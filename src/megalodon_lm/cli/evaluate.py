"""megalodon evaluate"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, subcommand

from ..errors import InputError
from .documents import Documents
from .long_prompts import Long
from .options import Shared
from .recall import Recall
from .tasks import Report, Tasks

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer
    from ..evaluation.by_context import Curve
    from ..evaluation.norm_statistics import NormSchedule
    from ..model.language_model import LanguageModel


@dataclass
class Perplexity(Shared):
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
        from ..evaluation.norm_statistics import NormSchedule
        from ..files import FIGURES, PICTURE, check_writable
        from .models import loaded_by_ranks

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
        if (code := self.launched()) is not None:
            sys.exit(code)
        with loaded_by_ranks(self.model, self.device) as (_, reader, tokenizer):
            self._measure(reader, tokenizer, schedules)

    def _measure(
        self, model: "LanguageModel", tokenizer: "Tokenizer", schedules: "Sequence[NormSchedule | None]"
    ) -> None:
        """Of several ranks, what the first one does."""
        import json

        import torch

        from ..data.corpus import Texts, texts_of
        from ..evaluation.by_context import draw, measure
        from ..evaluation.perplexity import Losses
        from ..files import write_atomically
        from ..training.precision import choose_precision
        from .progress import progress_bar, results

        texts = Texts(self.text, "kept")
        assert texts.num_bytes is not None
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
class Evaluate:
    """Measure a trained model, or what models of a kind learn."""

    task: (
        Annotated[Perplexity, subcommand("perplexity")]
        | Annotated[Compressors, subcommand("compressors")]
        | Annotated[Recall, subcommand("recall")]
        | Annotated[Tasks, subcommand("tasks")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Documents, subcommand("documents")]
        | Annotated[Long, subcommand("long")]
    )
    """What to measure."""

    def run(self) -> None:
        """Carry out the command."""
        self.task.run()
