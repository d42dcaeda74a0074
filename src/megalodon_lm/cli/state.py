"""megalodon state"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional


@dataclass
class StateFile:
    """Look at a file in which a context is kept: tokens read, loss, model, tokenizer, date, size. The file is checked.

    `megalodon read` and `megalodon generate --save` write such files.
    """

    action: Positional[Literal["show"]]
    """What to do."""
    file: Positional[Path]
    """The file."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Carry out the command."""
        import json

        from ..generation.context import describe

        found = describe(self.file)
        if self.json:
            print(json.dumps(found, indent=2))
            return
        for name, value in found.items():
            print(f"{name + ':':<32} {value:,}" if isinstance(value, int) else f"{name + ':':<32} {value}")
