"""Does it cost anything to share a sequence out over ranks?

    python benchmarks/chunk_ranks.py --length 32768 --rounds 3 --json chunk_ranks.json

Trains steps of one sequence in one process on two threads, and in two ranks of one thread each (mesh.chunk = 2), in
turns, every other round in reverse order. Prints the ratio of tokens per second, the median of the rounds' and their
extremes; how much of a step each rank's processor was at work, and how long it stood in messages; and the memory that a
step adds at its peak, activations for the most part: of one rank, over that of the one process. Memory is measured in
turns of its own, whose allocator gives freed tensors back at once.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

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

    model: str = "small"
    """A named size."""
    length: int = 32768
    """Tokens of the sequence."""
    steps: int = 2
    """Of each turn, of which the first is not counted."""
    rounds: int = 3
    """Turns of each; 0 measures memory alone."""
    exchanges: list[Exchange] = field(default_factory=lambda: ["chain"])
    """Of states: chain, parallel."""
    json: Path | None = None
    """Write all figures to this file."""


GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc: freed tensors at once


def in_messages(exchange: Any) -> list[float]:
    """Seconds that a rank has stood waiting for messages, from now on in one number."""
    waited, receive = [0.0], exchange.Line.receive

    def timed(*args: Any) -> Any:
        began = time.perf_counter()
        message = receive(*args)
        waited[0] += time.perf_counter() - began
        return message

    exchange.Line.receive = timed
    return waited


def work(model_name: str, length: int, steps: int, exchange: str, folder: str, of_memory: bool) -> None:
    """One process, alone or a rank of two: seconds a step and bytes at the peak, as JSON."""
    if not of_memory:
        keep_freed_memory()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(2 // ranks)
    torch.manual_seed(0)
    model: Any = Megalodon(ModelConfig.named(model_name))
    reader, waited = model, [0.0]
    if ranks > 1:
        import torch.distributed as dist

        from megalodon_lm.parallel import exchange as messages
        from megalodon_lm.parallel.chunk import ChunkParallel

        waited = in_messages(messages)

        dist.init_process_group("cpu:gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        reader = ChunkParallel(model, dist.group.WORLD, exchange)  # type: ignore[arg-type]
    device = torch.device("cpu")
    precision = choose_precision("auto", device)
    tokens = torch.randint(0, model.config.vocab_size, (1, length + 1))
    found: list[dict[str, float]] = []
    for _ in range(steps):
        model.zero_grad(set_to_none=False)
        forget_peak()
        if ranks > 1:
            dist.barrier()
        before, began, busy, waited[0] = resident() or 0, time.perf_counter(), time.process_time(), 0.0
        with autocast(precision, device):
            loss, _ = reader(tokens[:, :-1], targets=tokens[:, 1:])
        loss.backward()
        found.append({
            "seconds": time.perf_counter() - began, "busy": time.process_time() - busy, "waited": waited[0],
            "peak": (resident(peak=True) or 0) - before,
        })  # fmt: skip
    counted = {key: median(step[key] for step in found[1:] or found) for key in found[0]}
    Path(folder, f"found{rank}").write_text(json.dumps(counted))
    if ranks > 1:
        dist.barrier()
    os._exit(0)


def turn(a: ChunkRanks, ranks: int, exchange: str, of_memory: bool = False) -> dict[str, Any]:
    """A step of so many ranks: seconds of the slowest, bytes of the largest, and what each rank found."""
    with TemporaryDirectory() as folder:
        code = "import sys; sys.path.insert(0, sys.argv[1]); import chunk_ranks; chunk_ranks.work("
        code += f"{a.model!r}, {a.length}, {a.steps}, {exchange!r}, {folder!r}, {of_memory})"
        started = []
        for rank in range(ranks):
            settings = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks), **(GIVING_BACK if of_memory else {})}
            settings |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
            started.append(subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent)], env=settings))
        if any([process.wait() for process in started]):
            raise SystemExit("a process failed")
        found = [json.loads(Path(folder, f"found{rank}").read_text()) for rank in range(ranks)]
    return {**{key: max(f[key] for f in found) for key in ("seconds", "peak")}, "ranks": found}


def main() -> None:
    """Measure and show."""
    a = tyro.cli(ChunkRanks)
    ways = [("alone", 1, "chain"), *((exchange, 2, exchange) for exchange in a.exchanges)]
    memory = {name: turn(a, ranks, exchange, True)["peak"] for name, ranks, exchange in ways}
    for name, _, _ in ways[1:]:
        print(f"2 ranks, {name}: {memory[name] / memory['alone']:.3f} of the memory of one process, "
              f"{memory['alone'] / 1e6:.0f} MB")  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in ways}
    for number in range(a.rounds):
        for name, ranks, exchange in ways if number % 2 == 0 else reversed(ways):
            found[name].append(turn(a, ranks, exchange))
    for name, _, _ in ways[1:] if a.rounds else []:
        pairs = list(zip(found["alone"], found[name], strict=True))
        rates = [one["seconds"] / two["seconds"] for one, two in pairs]
        print(
            f"2 ranks, {name}: {median(rates):.3f} ({min(rates):.3f} to {max(rates):.3f}) of the tokens per second of "
            "one process"
        )
        for number in range(2):
            ranks = [two["ranks"][number] for _, two in pairs]
            busy, waited = (median(r[key] / r["seconds"] for r in ranks) for key in ("busy", "waited"))
            print(f"  rank {number}: at work {busy:.3f} of a step, {waited:.3f} of it in messages")
    if a.json:
        figures = {"length": a.length, "model": a.model, "memory": memory, "turns": found}
        write_atomically(a.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
