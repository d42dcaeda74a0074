"""megalodon read"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ..errors import InputError
from .options import Quiet


@dataclass
class Read(Quiet):
    """Read texts of any length, in constant memory, and keep what was read as a small file: a bookmark.

    `megalodon generate MODEL --state book.state` writes on from it, `megalodon chat` talks about it, and another
    `megalodon read` reads on. Interrupted, it saves what it has read so far.
    """

    model: Positional[Path]
    """A run folder or a saved model."""
    text: Positional[list[str]]
    """Text files, folders of .txt files, bundled:validation (Dracula), or - for standard input; read in this order."""
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
        import time

        from ..data.corpus import Source, find_documents, size
        from ..files import BOOKMARK, check_writable
        from ..generation.context import Context
        from ..generation.generator import Generator
        from .models import load_trained
        from .progress import console, progress_bar

        if not self.text:
            raise InputError("no text given; name a file, a folder, bundled:validation, or - for standard input")
        check_writable(self.save, BOOKMARK)
        documents: dict[str, Source] = {}
        total = 0
        for text in self.text:
            if text == "-":
                documents["standard input"] = sys.stdin.buffer
                continue
            found = find_documents([text])
            documents.update(found)
            total += sum(map(size, found.values()))
        model, tokenizer = load_trained(self.model, self.device)
        generator = Generator(model, tokenizer, self.precision)
        context = generator.context(self.state)
        began, start = time.perf_counter(), context.position

        def progress(complete: bool = False) -> str:
            rate = (context.position - start) / (time.perf_counter() - began)
            loss = context.loss(complete)  # of nothing, while the first piece is unfinished
            return f"{context.position:,} tokens, {rate:,.0f} a second" + (
                "" if math.isnan(loss) and not context.scored else f", {loss:.3f} nats a token"
            )

        name, at = "", start
        try:
            with progress_bar("read", None if "-" in self.text else total) as move:

                def watch(context: Context) -> None:
                    move(context.position - start, progress())

                for source, document in documents.items():
                    name, at = source, context.position
                    generator.read(document, context, watch)
        except KeyboardInterrupt:
            context.save(self.save, tokenizer)
            console.print(f"interrupted after {context.position - at:,} bytes of {name}")
            print(f"{self.save}: {progress(complete=True)}")
            sys.exit(130)
        context.save(self.save, tokenizer)
        print(f"{self.save}: {progress(complete=True)}")
