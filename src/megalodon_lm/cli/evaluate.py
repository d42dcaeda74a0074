"""megalodon evaluate"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, subcommand


@dataclass
class Perplexity:
    """Loss and bits per byte of a text, by how far back the model may look.

    The text is read once for each context, with the state emptied every so many bytes, in constant memory; then by
    position in the longest context.
    """

    model: Positional[Path]
    """A run folder or a saved model."""
    text: Positional[list[str]] = field(default_factory=lambda: ["bundled:validation"])
    """Text files, folders of .txt files, or bundled:validation (Dracula)."""
    contexts: list[int] = field(default_factory=lambda: [64, 1024, 16384, 0])
    """Bytes of context; 0 for the whole text."""
    precision: str = "auto"
    """bf16 or float32 matrix products; auto takes bf16 where the processor has it."""
    json: Path | None = None
    """Also write the figures to this file."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        import json

        import torch
        from rich.table import Table

        from ..data.corpus import read_documents
        from ..data.tokenizer import ByteTokenizer
        from ..evaluation.perplexity import bits_per_byte, by_position, score
        from ..files import write_atomically
        from ..training.precision import check_precision, choose_precision
        from .models import load_trained
        from .progress import console, progress_bar

        for context in self.contexts:
            if context < 0:
                raise ValueError(f"--contexts {context} must be at least 0; 0 means the whole text")
        documents = read_documents(self.text)
        text = b"".join(documents.values())
        model, tokenizer = load_trained(self.model, self.device), ByteTokenizer()
        tokens = torch.from_numpy(tokenizer.encode(text))
        precision = choose_precision(check_precision(self.precision), torch.device(self.device))
        by_context: dict[int, float] = {}
        positions: dict[int, float] = {}
        for context in sorted({c or len(tokens) for c in self.contexts}):
            done = 0
            with progress_bar(f"context {context:,}", len(tokens)) as move:

                def count(scored: int, move: Any = move) -> None:
                    nonlocal done
                    done += scored
                    move(min(done, len(tokens)))

                losses = score(model, tokens, tokenizer.begin, context, precision, count)
            by_context[context] = bits_per_byte(losses, len(text))
            positions = by_position(losses, min(context, len(tokens)))
        console.print(f"{len(text):,} bytes of {len(documents)} documents, {precision}", highlight=False)
        table = Table("context", "bits per byte", "loss (nats per token)")
        for context, value in by_context.items():
            table.add_row(f"{context:,}", f"{value:.4f}", f"{value * len(text) / len(tokens) * 0.6931471805599453:.4f}")
        console.print(table)
        table = Table("position up to", "bits per byte")
        for position, value in positions.items():
            table.add_row(f"{position:,}", f"{value:.4f}")
        console.print(table)
        if self.json is not None:
            figures = {
                "bytes": len(text),
                "tokens": len(tokens),
                "precision": precision,
                "bits_per_byte_by_context": by_context,
                "bits_per_byte_by_position": positions,
            }
            write_atomically(self.json, json.dumps(figures, indent=2) + "\n")


@dataclass
class Compressors:
    """Bits per byte of gzip, xz and bzip2 on a text: what a model has to beat."""

    text: Positional[list[str]] = field(default_factory=lambda: ["bundled:validation"])
    """Text files, folders of .txt files, or bundled:validation (Dracula)."""

    def run(self) -> None:
        """Carry out the command."""
        from ..data.corpus import read_documents
        from ..evaluation.perplexity import compressors

        for name, value in compressors(b"".join(read_documents(self.text).values())).items():
            print(f"{name:<6} {value:.4f} bits per byte")


@dataclass
class Evaluate:
    """Measure a trained model."""

    task: Annotated[Perplexity, subcommand("perplexity")] | Annotated[Compressors, subcommand("compressors")]
    """What to measure."""

    def run(self) -> None:
        """Carry out the command."""
        self.task.run()
