"""Read millions of tokens: does memory stay, does speed stay, do the numbers stay?

    python benchmarks/soak.py --tokens 10000000 --json soak.json

Reads the bundled novels over and over in one context. Records resident memory and the time of every step of about
10,000 tokens; at powers of two, how far the logits are from those of a copy of the model in float64 that read the same
(portable operations, so nothing is shared with the fast path). At the end the first and the last context read the same
steps in turns, so that a change in the machine's own speed drops out.
"""

import copy
import gc
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from megalodon_lm import ByteTokenizer, Context, Megalodon, ModelConfig
from megalodon_lm.data.corpus import Texts
from megalodon_lm.files import write_atomically
from megalodon_lm.training.memory import resident

STEP = 10_000  # tokens, about
SETTLED = 100_000  # tokens until memory should grow no more
TURNS = 15  # rounds at the end


@dataclass
class Soak:
    """See the head of the file."""

    model: str = "small"
    """A run folder or saved model; or a named size, with random weights."""
    tokens: int = 10_000_000
    """To read."""
    compare: int = 1 << 20
    """Tokens the copy in float64 reads too: about 20 times as slow; 0 for none."""
    precision: str = "float32"
    """Of matrix products."""
    json: Path | None = None
    """Write all figures to this file."""


def text() -> Iterator[np.ndarray]:
    """Tokens of the novels, without end."""
    novels = Texts(["bundled:train"])
    while True:
        yield from (ByteTokenizer().encode(block) for novel in novels for block in novel.blocks)


def steps(length: int) -> Iterator[np.ndarray]:
    """The same in steps of so many tokens."""
    rest = np.zeros(0, np.int64)
    for block in text():
        rest = np.concatenate([rest, block])
        while len(rest) >= length:
            yield rest[:length]
            rest = rest[length:]


class Exact:
    """The same model and text in float64."""

    def __init__(self, model: Megalodon):
        self.model, self.state = copy.deepcopy(model).double(), None

    @torch.inference_mode()
    def read(self, tokens: np.ndarray) -> torch.Tensor:
        """Logits (vocabulary,) after the last of the tokens."""
        for part in torch.from_numpy(tokens)[None].split(4096, dim=1):
            logits, self.state = self.model(part, self.state, logits_to_keep=1)
        return logits[0, 0]


def load(name: str) -> Megalodon:
    """A saved model, or random weights of a named size."""
    torch.manual_seed(0)
    return (Megalodon.load(name) if Path(name).is_dir() else Megalodon(ModelConfig.named(name))).eval()


def memory() -> int:
    """Resident bytes, 0 where the system does not tell."""
    gc.collect()
    return resident() or 0


def read(arguments: Soak, console: Console) -> dict[str, Any]:
    """All figures."""
    model = load(arguments.model)
    context = Context(model, arguments.precision)
    length = max(1, round(STEP / context.piece)) * context.piece
    source = steps(length)
    context.read(np.array([ByteTokenizer.begin]))  # from here on every step is whole pieces
    exact = Exact(model) if arguments.compare else None
    if exact:
        exact.read(np.array([ByteTokenizer.begin]))
    first = context.fork()
    records, differences = [], {}
    while context.position < arguments.tokens:
        tokens = next(source)
        began = time.perf_counter()
        context.read(tokens)
        seconds = time.perf_counter() - began
        records.append({"position": context.position, "seconds": seconds, "memory": memory()})
        if len(records) == 1:
            first = context.fork()  # the first step paid for compilation
        if exact:
            logits = exact.read(tokens)
            last = context.position >= arguments.compare
            if len(records).bit_count() == 1 or last:
                off = (context.finish()[0][0].double() - logits).abs().max().item()
                differences[context.position] = off
                console.print(f"{context.position:,} tokens: logits off float64 by {off:.1e}", highlight=False)
            exact = None if last else exact
        if len(records) % 100 == 0:
            console.print(f"{context.position:,} tokens, {memory() / 1e6:,.0f} MB", highlight=False)
    return {
        "model": arguments.model,
        "precision": context.precision,
        "step": length,
        "differences": differences,
        "turns": turns(first, context, list(itertools.islice(source, TURNS))),
        "steps": records,
    }


def turns(first: Context, last: Context, pieces: list[np.ndarray]) -> list[float]:
    """Time of a step after all that was read over that of the same step at the start, in turns."""
    ratios = []
    for tokens in pieces:
        seconds = []
        for context in (first.fork(), last.fork()):
            began = time.perf_counter()
            context.read(tokens)
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[1] / seconds[0])
    return ratios


def main() -> None:
    """Measure, show, write."""
    arguments, console = tyro.cli(Soak, description=__doc__), Console()
    found = read(arguments, console)
    records = found["steps"]
    settled = [r for r in records if r["position"] >= SETTLED] or records[-1:]
    beside = [r["memory"] for r in settled if r["position"] < arguments.compare]  # beside the copy in float64
    alone = [r["memory"] for r in settled if r["position"] >= arguments.compare + 2 * found["step"]]
    tenth = max(1, len(records) // 10)
    times = [[r["seconds"] * STEP / found["step"] for r in part] for part in (records[1 : tenth + 1], records[-tenth:])]
    found["memory_growth"] = max(max(part) - part[0] for part in (beside, alone, [0]) if part)
    found["time_ratio"] = median(found["turns"])
    table = Table("", "", title=f"{records[-1]['position']:,} tokens, {arguments.model}, {found['precision']}")
    table.add_row("memory at 100,000 tokens", f"{settled[0]['memory'] / 1e6:,.1f} MB")
    table.add_row("growth after that, with the copy or without", f"{found['memory_growth'] / 1e6:,.1f} MB")
    table.add_row(f"time of {STEP:,} tokens, first tenth", f"{median(times[0]):.4f} s (median)")
    table.add_row(f"time of {STEP:,} tokens, last tenth", f"{median(times[1]):.4f} s (median)")
    spread = f"{min(found['turns']):.3f} - {max(found['turns']):.3f}"
    table.add_row("end over start, in turns", f"{found['time_ratio']:.3f} ({spread})")
    for position, difference in found["differences"].items():
        table.add_row(f"logits off float64 at {position:,}", f"{difference:.1e}")
    console.print(table)
    if arguments.json:
        write_atomically(arguments.json, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
