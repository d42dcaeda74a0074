"""megalodon prepare"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ..errors import InputError
from .options import Quiet


@dataclass
class Prepare(Quiet):
    """Turn text into token shards that training reads through memory maps.

    Takes text, Markdown and JSONL, also compressed with gzip or zstd, Parquet, and folders of them. What cannot be
    taken as it is, such as a malformed line, is counted and listed with its place in faults.jsonl, and what is left out
    of the folders in left_out.jsonl. Interrupted, the same command goes on where it was, and the result is the same.
    """

    sources: Positional[list[str]]
    """Files, folders, or - for standard input. A text file is one document, a line or row is one document."""
    out: Path
    """Folder to make; a recipe names it in data.train."""
    tokenizer: str = "bytes"
    """bytes; a tokenizer.json, as megalodon tokenizer train makes; or a SentencePiece model."""
    field: str = ""
    """Field of JSONL and Parquet that holds the text; by default text, or messages with --chats."""
    encoding: str = "utf-8"
    """Of text files without a byte order mark."""
    chats: bool = False
    """Every line or row is a chat: a list of messages, each with a role and a content. Training on them learns the
    messages of the assistant alone."""
    workers: int = 0
    """Processes; 0 for one a processor."""

    def run(self) -> None:
        """Carry out the command."""
        import time

        from ..data.prepare import FAULTS, LEFT_OUT, Progress, prepare
        from .progress import console, progress_bar

        if self.workers < 0:
            raise InputError(f"--workers {self.workers} must be at least 0; 0 takes one a processor")
        began, read = time.perf_counter(), 0
        with progress_bar("prepare", None) as move:

            def watch(p: Progress) -> None:
                nonlocal read
                read = p.done - p.earlier
                move(p.done, f"{p.done / max(1, p.total):.0%}, {p.tokens:,} tokens, {p.faults:,} faults")

            made = prepare(
                self.sources, self.out, self.tokenizer, self.field, self.encoding, self.chats, self.workers, watch
            )
        seconds = time.perf_counter() - began
        print(
            f"{made['tokens']:,} tokens of {made['documents']:,} documents in {len(made['shards'])} shards; "
            f"{read / 1e6 / seconds:.1f} MB/s; {self.out}"
        )
        if made["left_out"]:
            counts = ", ".join(f"{reason} ({count:,})" for reason, count in made["left_out"].items())
            console.print(f"not read, by reason: {counts}; listed in {self.out / LEFT_OUT}", highlight=False)
        if made["faults"]:
            console.print(f"{made['faults']:,} faults, listed in {self.out / FAULTS}")
