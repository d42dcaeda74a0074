"""megalodon read"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from .options import Shared

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer
    from ..model.language_model import LanguageModel


@dataclass
class Read(Shared):
    """Read texts of any length, in constant memory, and keep what was read as a small file: a bookmark.

    `megalodon generate MODEL --state book.state` writes on from it, `megalodon chat` talks about it, and another
    `megalodon read` reads on. Interrupted, it saves what it has read so far.
    """

    model: Positional[Path]
    """A run folder or a saved model."""
    text: Positional[list[str]]
    """Files and folders, as for megalodon prepare, bundled:validation (Dracula), or - for standard input; read in this
    order. Each text after the first comes after a begin token."""
    save: Path
    """The bookmark to write."""
    state: Path | None = None
    """A bookmark to read on from."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        from ..files import BOOKMARK, check_writable
        from .models import loaded_by_ranks

        check_writable(self.save, BOOKMARK)
        if (code := self.launched()) is not None:
            sys.exit(code)
        with loaded_by_ranks(self.model, self.device) as (model, reader, tokenizer):
            self._read(model, reader, tokenizer)

    def _read(self, model: "LanguageModel", reader: "LanguageModel", tokenizer: "Tokenizer") -> None:
        """Of several ranks, what the first one does."""
        import time

        from ..data.corpus import Texts
        from ..generation.generator import Generator
        from .progress import console, progress_bar

        texts = Texts(self.text, "once")
        generator = Generator(reader, tokenizer, self.precision)
        context = generator.context(self.state)
        began, start = time.perf_counter(), context.position

        def progress(complete: bool = False) -> str:
            rate = (context.position - start) / (time.perf_counter() - began)
            loss = context.loss(complete)  # of nothing, while the first piece is unfinished
            return f"{context.position:,} tokens, {rate:,.0f} a second" + (
                "" if loss is None else f", {loss:.3f} nats a token"
            )

        try:
            with progress_bar("read", texts.num_bytes) as move:
                generator.read(texts, context, lambda _: move(texts.done, progress()))
        except KeyboardInterrupt:
            context = context.read_by(model)
            context.save(self.save, tokenizer)
            # a tokenizer may still hold the last of them
            console.print(f"interrupted within the first {texts.num_read:,} bytes of {texts.name}")
            print(f"{self.save}: {progress(complete=True)}")
            sys.exit(130)
        context = context.read_by(model)
        context.save(self.save, tokenizer)
        print(f"{self.save}: {progress(complete=True)}")
