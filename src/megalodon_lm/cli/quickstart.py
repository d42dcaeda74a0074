"""megalodon quickstart"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError
from .options import Quiet

PROMPT = "It was a dark and stormy night"


@dataclass
class Quickstart(Quiet):
    """Train a small model on the bundled novels, measure it against its context, and let it write.

    Takes about 5 minutes of training and 1 of measuring on 2 cores, and needs nothing but this package. The run folder
    holds the recipe, the weights (safetensors), the metrics (JSONL) and a report (report.md, report.png, report.json).
    """

    out: Path | None = None
    """Run folder to create; the default is runs/quickstart, or the next free number."""
    minutes: float = 5.0
    """Minutes of training."""
    size: str = "auto"
    """Size of the model, such as micro; auto for the one that learns most in the time, by the speed of the machine."""
    evaluate_bytes: int = 0
    """Bytes of the validation text to measure on; 0 for all of it."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of matrix products; auto takes bf16 where the device multiplies it natively."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""

    def run(self) -> None:
        """Carry out the command."""
        began = time.perf_counter()
        import torch

        from ..data.corpus import Texts
        from ..evaluation.quickstart import measure
        from ..ops.device import choose_device
        from ..training.budget import byte_model
        from ..training.machine import product_rate
        from ..training.precision import choose_precision
        from ..training.recipe import Recipe
        from ..training.run_folder import free_run_folder
        from ..training.trainer import Trainer
        from .progress import console, progress_bar, results
        from .training import train_with_progress

        if not 0 < self.minutes < math.inf:
            raise InputError(f"--minutes {self.minutes} must be positive and finite")
        if self.evaluate_bytes < 0:
            raise InputError(f"--evaluate-bytes {self.evaluate_bytes} must be at least 0; 0 measures on all")
        device = choose_device(self.device)
        precision = choose_precision(self.precision, device)
        rate = product_rate(precision, device)
        size = byte_model(60 * self.minutes * rate) if self.size == "auto" else self.size
        changes = [f"training.minutes={self.minutes}", f"training.precision={precision}", f"model.size={size}"]
        recipe = Recipe.load("quickstart", changes)
        if 0 < self.evaluate_bytes < recipe.training.length:
            raise InputError(
                f"--evaluate-bytes {self.evaluate_bytes} must be at least {recipe.training.length}, the training length"
            )
        folder = self.out or free_run_folder(Path("runs") / "quickstart")
        trainer = Trainer(recipe, folder, self.device)
        console.print(f"this machine makes {rate / 1e9:,.0f} GFLOP/s of {precision} matrix products: size {size}")
        finished, curve = train_with_progress(trainer)
        if not finished:
            print(folder)
            sys.exit(130)
        text = Texts(recipe.data.validation).whole()
        text = text[: self.evaluate_bytes or len(text)]
        torch.manual_seed(recipe.training.seed)
        with progress_bar("measure", 1.0) as move:
            report = measure(trainer, text, PROMPT, move)
        report.total_seconds = time.perf_counter() - began
        report.save(folder, curve)
        for context, value in report.bits_per_byte_by_context.items():
            results.print(f"context {context:>7,}: {value:.3f} bits per byte")
        results.print(f"\n{report.sample}\n")
        others = ", ".join(f"{name} {value:.3f}" for name, value in report.baselines.items())
        print(f"{report.bits_per_byte:.3f} bits per byte on the whole validation text ({others})")
        print(f"report: {folder / 'report.md'}")
        print(f'next: megalodon generate {folder} --prompt "{PROMPT}"')
