"""How long do the commands take from their start to the prompt and to the first token, with kernels in the cache?

    python benchmarks/startup.py --json startup.json

Each command is a process of its own, run once unmeasured, so that the kernels are compiled, then in turns with the
others. Wall and processor seconds are medians; the second depend less on what else the machine does. `import torch`
alone is what no command that uses a model can go below.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import tyro
from rich.console import Console
from rich.table import Table

from megalodon_lm import ByteTokenizer, Megalodon, ModelConfig
from megalodon_lm.files import write_atomically


@dataclass
class Startup:
    """See the head of the file."""

    model: Path | None = None
    """A run folder or a saved model; an untrained bench22M by default."""
    rounds: int = 5
    """Runs of each command."""
    json: Path | None = None
    """Write all figures to this file."""


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a process that finds the end of its input at once."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def main(choices: Startup) -> None:
    """Measure and show."""
    with TemporaryDirectory() as folder:
        if choices.model is None:
            config = replace(ModelConfig.named("bench22M"), vocab_size=ByteTokenizer().vocab_size)
            Megalodon(config).save(folder)
        model = str(choices.model or folder)
        megalodon = [sys.executable, "-m", "megalodon_lm.cli.main"]
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "megalodon --help": [*megalodon, "--help"],
            "megalodon chat, to the prompt": [*megalodon, "chat", model],
            "megalodon generate, one token": [*megalodon, "generate", model, "--prompt", "Hello", "--max-tokens", "1"],
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(choices.rounds + 1):
            for name, command in commands.items():
                spent = timed(command)
                if turn:
                    seconds[name].append(spent)
    medians = {}
    for name, spent in seconds.items():
        walls, processor = zip(*spent, strict=True)
        medians[name] = {"wall": median(walls), "processor": median(processor)}
    table = Table("seconds", "wall", "processor", title=f"from the start, {torch.get_num_threads()} threads")
    for name, value in medians.items():
        table.add_row(name, *(f"{number:.2f}" for number in value.values()))
    Console().print(table)
    if choices.json is not None:
        write_atomically(choices.json, json.dumps(medians, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Startup))
