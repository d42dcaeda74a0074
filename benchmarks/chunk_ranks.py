"""Does it cost anything to share a sequence out over ranks?

    python benchmarks/chunk_ranks.py --length 32768 --rounds 5 --json chunk_ranks.json

Trains steps of one sequence in one process on two threads, and in two ranks of one thread each (mesh.chunk = 2), in
turns, every other round in reverse order. Prints the ratio of tokens per second, the median of the rounds' and their
extremes, and the memory that a step adds at its peak: of one rank, over that of the one process.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
import tyro

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.files import write_atomically
from megalodon_lm.parallel.mesh import Exchange
from megalodon_lm.training.memory import forget_peak, keep_freed_memory, resident
from megalodon_lm.training.precision import autocast, choose_precision


@dataclass
class ChunkRanks:
    """See the head of the file."""

    model: str = "bench22M"
    """A named size."""
    length: int = 32768
    """Tokens of the sequence."""
    steps: int = 3
    """Of each turn, of which the first is not counted."""
    rounds: int = 5
    """Turns of each."""
    json: Path | None = None
    """Write all figures to this file."""


def work(model_name: str, length: int, steps: int, exchange: str, folder: str) -> None:
    """One process, alone or a rank of two: seconds a step and bytes at the peak, as JSON."""
    keep_freed_memory()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(2 // ranks)
    torch.manual_seed(0)
    model: Any = Megalodon(ModelConfig.named(model_name))
    reader = model
    if ranks > 1:
        import torch.distributed as dist

        from megalodon_lm.parallel.chunk import ChunkParallel

        dist.init_process_group("cpu:gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        reader = ChunkParallel(model, dist.group.WORLD, exchange)  # type: ignore[arg-type]
    device = torch.device("cpu")
    precision = choose_precision("auto", device)
    tokens = torch.randint(0, model.config.vocab_size, (1, length + 1))
    seconds: list[float] = []
    peak = 0
    for _ in range(steps):
        model.zero_grad(set_to_none=False)
        forget_peak()
        before, began = resident() or 0, time.perf_counter()
        with autocast(precision, device):
            loss, _ = reader(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        seconds.append(time.perf_counter() - began)
        peak = (resident(peak=True) or 0) - before
    Path(folder, f"found{rank}").write_text(json.dumps({"seconds": median(seconds[1:]), "peak": peak}))
    if ranks > 1:
        dist.barrier()
    os._exit(0)


def turn(a: ChunkRanks, ranks: int, exchange: str) -> dict[str, float]:
    """A step of so many ranks: seconds of the slowest, bytes of the largest."""
    with TemporaryDirectory() as folder:
        code = "import sys; sys.path.insert(0, sys.argv[1]); import chunk_ranks; chunk_ranks.work("
        code += f"{a.model!r}, {a.length}, {a.steps}, {exchange!r}, {folder!r})"
        started = []
        for rank in range(ranks):
            settings = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks)}
            settings |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            started.append(subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent)], env=settings))
        if any([process.wait() for process in started]):
            raise SystemExit("a process failed")
        found = [json.loads(Path(folder, f"found{rank}").read_text()) for rank in range(ranks)]
    return {key: max(f[key] for f in found) for key in ("seconds", "peak")}


def main() -> None:
    """Measure and show."""
    a = tyro.cli(ChunkRanks)
    ways = [("alone", 1, "chain"), *((exchange, 2, exchange) for exchange in get_args(Exchange))]
    found: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in ways}
    for number in range(a.rounds):
        for name, ranks, exchange in ways if number % 2 == 0 else reversed(ways):
            found[name].append(turn(a, ranks, exchange))
    for name, _, _ in ways[1:]:
        pairs = list(zip(found["alone"], found[name], strict=True))
        rates = [one["seconds"] / two["seconds"] for one, two in pairs]
        memory = [two["peak"] / max(1, one["peak"]) for one, two in pairs]
        print(
            f"2 ranks, {name}: {median(rates):.3f} ({min(rates):.3f} to {max(rates):.3f}) of the tokens per second of "
            f"one process, {median(memory):.2f} of its memory"
        )
    if a.json:
        write_atomically(a.json, json.dumps({"length": a.length, "model": a.model, "turns": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
