"""megalodon tokenizer"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .options import Quiet


@dataclass
class Tokenizer(Quiet):
    """Train a tokenizer: byte-level BPE, as a tokenizer.json that the tokenizers library reads too."""

    action: Positional[Literal["train"]]
    """What to do."""
    sources: Positional[list[str]]
    """Files and folders, as for megalodon prepare."""
    out: Path
    """File to write, tokenizer.json usually."""
    vocab_size: int = 8192
    """Tokens, the three special ones included."""
    field: str = "text"
    """Field of JSONL and Parquet that holds the text."""
    encoding: str = "utf-8"
    """Of text files without a byte order mark."""

    def run(self) -> None:
        """Carry out the command."""
        from ..data.documents import DocumentReader, Part, told
        from ..data.sources import find_files
        from ..data.spans import spans
        from ..data.subword import train_bpe
        from ..errors import InputError
        from ..files import TOKENIZER, check_writable, write_atomically
        from .progress import console

        check_writable(self.out, TOKENIZER)
        reader = DocumentReader(self.field, self.encoding)
        found, documents = find_files(self.sources), 0

        def texts() -> Iterator[str]:
            nonlocal documents
            for path in found.files:
                for document in reader.documents(Part(str(path), 0, -1, 0)):
                    documents += 1
                    assert not isinstance(document.content, list)
                    blocks = (block.decode() for block in document.content)
                    yield from (span for _, span in spans(blocks))

        trained = train_bpe(texts(), self.vocab_size)
        if not documents:
            why = "".join(f"; {told(fault)}" for fault in reader.faults[:1])
            raise InputError(f"there is no text in {', '.join(self.sources)}{why}")
        write_atomically(self.out, trained)
        if found.left_out:
            console.print(str(found))
        for fault in reader.faults[:10]:
            console.print(told(fault))
        if more := len(reader.faults[10:]) + reader.unlisted:
            console.print(f"and {more:,} more faults")
        print(self.out)
