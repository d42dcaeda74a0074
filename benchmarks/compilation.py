"""How long do the kernels take to compile at their first use, and to come from the cache later?

    python benchmarks/compilation.py

Three processes one after the other share a new cache folder. Each trains a step of a small model, reads a prompt and
writes a few tokens, so that every kernel is needed: the first one in the precision that this machine's runs take, the
others in float32 and bf16. What the same work takes longer at first than again is compiling, in the third process
loading; imports are not counted. Numba's clock stands beside.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table

from megalodon_lm.ops import cpu
from megalodon_lm.training.precision import autocast, choose_precision

RUN = "run"
PRECISIONS = ["float32", "bf16"]


def work(precisions: list[str]) -> None:
    """Use every kernel once in each precision."""
    from megalodon_lm import ByteTokenizer, Generator, Megalodon, ModelConfig, Sampling

    torch.manual_seed(0)
    model = Megalodon(ModelConfig.named("tiny"))
    tokens = torch.randint(0, 256, (2, 101))
    starts = torch.zeros(2, 100, dtype=torch.bool)
    starts[0, 30] = True
    for precision in precisions:
        with autocast(precision, torch.device("cpu")):  # type: ignore[arg-type]
            _, state = model(tokens[:, :10])
            loss, _ = model(tokens[:, :-1], state, targets=tokens[:, 1:], document_starts=starts)
        loss.backward()
        generator = Generator(model.eval(), ByteTokenizer(), precision)  # type: ignore[arg-type]
        generator.write([generator.read("a prompt") for _ in range(2)], Sampling(max_tokens=4))
        model.train()


def run(precisions: list[str]) -> None:
    """In a process of its own: the seconds of compiling, and of the work at first and again."""
    from numba.core import event

    for module in pkgutil.iter_modules(cpu.__path__, f"{cpu.__name__}."):
        importlib.import_module(module.name)
    importlib.import_module("torch._dynamo")  # PyTorch imports it at the first operator with a gradient
    with event.install_timer("numba:compile", lambda seconds: None) as timer:
        began = time.perf_counter()
        work(precisions)
        first = time.perf_counter() - began
    began = time.perf_counter()
    work(precisions)
    compiling = timer.duration if timer.done else 0.0
    print(json.dumps({"compiling": compiling, "first": first, "again": time.perf_counter() - began}))


def main() -> None:
    """Measure and show."""
    own = choose_precision("auto", torch.device("cpu"))
    table = Table("seconds", "compiling", "the work at first", "again", title="every kernel")
    runs = {f"first run, {own}": [own], "and the other precision": PRECISIONS, "from the cache, both": PRECISIONS}
    with tempfile.TemporaryDirectory() as cache:
        for name, precisions in runs.items():
            done = subprocess.run(
                [sys.executable, __file__, RUN, *precisions], env=os.environ | {"NUMBA_CACHE_DIR": cache}, check=True,
                capture_output=True, text=True,
            )  # fmt: skip
            seconds = json.loads(done.stdout.splitlines()[-1])
            table.add_row(name, *(f"{value:.2f}" for value in seconds.values()))
    Console().print(table)


if __name__ == "__main__":
    run(sys.argv[2:]) if sys.argv[1:2] == [RUN] else main()
