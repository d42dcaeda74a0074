"""The trainer: reads long documents in order, carries the State from step to step, and leaves a usable run folder."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..data.batches import Batch, Stream
from ..data.corpus import read_documents
from ..data.tokenizer import ByteTokenizer
from ..files import write_atomically
from ..model.decoder import Megalodon
from ..state import State
from .loss import linear_cross_entropy
from .optimizer import build_optimizer, learning_rate
from .precision import autocast, choose_precision
from .recipe import Recipe
from .run_folder import RECIPE_FILE, MetricsFile, create_run_folder


@dataclass
class StepMetrics:
    """What one step did: loss in bits per token, rates in tokens per second, times in seconds since the start."""

    step: int
    tokens: int
    bits_per_token: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    seconds: float
    progress: float


class Trainer:
    """One training run.

    Args:
        recipe: what to train on what.
        folder: a new or empty run folder.
        device: where to train.

    Raises:
        ValueError: unusable folder, missing text, or a vocabulary too small for the tokenizer.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, device: torch.device | str = "cpu"):
        self.recipe, self.device = recipe, torch.device(device)
        t = recipe.training
        self.tokenizer = ByteTokenizer()
        if recipe.model.vocab_size < self.tokenizer.vocab_size:
            raise ValueError(
                f"vocab_size = {recipe.model.vocab_size} is too small for bytes and their special tokens; "
                f"use {self.tokenizer.vocab_size}"
            )
        documents = read_documents(recipe.data.train)
        self.batches = Stream(list(documents.values()), self.tokenizer, t.batch_size, t.length, t.seed)
        self.folder = create_run_folder(folder)
        write_atomically(self.folder / RECIPE_FILE, recipe.to_toml())
        torch.manual_seed(t.seed)
        with self.device:
            self.model = Megalodon(recipe.model, t.activation_checkpointing)
        if t.compile:
            compile_blocks(self.model, self.device)
        self.optimizer = build_optimizer(self.model, t)
        self.precision = choose_precision(t.precision, self.device)
        self.state: State | None = None
        self.tokens = 0
        self.seconds = 0.0

    def train(self, watch: Callable[[StepMetrics], None] = lambda metrics: None) -> bool:
        """Run to the end of the recipe, or to an interrupt; either way the weights are saved.

        Args:
            watch: called after every step.

        Returns:
            Whether the run reached its end.
        """
        t = self.recipe.training
        metrics = MetricsFile(self.folder)
        self.model.train()
        began = saved = time.perf_counter()
        step, progress = 0, 0.0
        try:
            with _interruptible() as interrupted:
                for batch in self.batches:
                    rate = learning_rate(t, step, progress)
                    at = time.perf_counter()
                    loss, norm = self._step(batch, rate)
                    now = time.perf_counter()
                    step += 1
                    self.tokens += batch.inputs.numel()
                    self.seconds = now - began
                    progress = self.seconds / (60 * t.minutes) if t.minutes else step / t.steps
                    speed = batch.inputs.numel() / (now - at)
                    record = StepMetrics(
                        step, self.tokens, loss / math.log(2), rate, norm, speed, self.seconds, min(1.0, progress)
                    )
                    metrics.write(asdict(record))
                    watch(record)
                    if not math.isfinite(loss):
                        raise ValueError(
                            f"the loss is {loss} at step {step}; lower training.learning_rate = {t.learning_rate}, "
                            "or raise training.warmup_steps"
                        )
                    if progress >= 1 or interrupted():
                        break
                    if now - saved > 60 * t.checkpoint_minutes:
                        self.model.save(self.folder)
                        saved = now
        finally:
            metrics.close()
        self.model.save(self.folder)
        return progress >= 1

    def _step(self, batch: Batch, rate: float) -> tuple[float, float]:
        """One optimiser step: loss in nats per token, and the norm of the gradient before clipping."""
        t = self.recipe.training
        inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        state = self.state if t.carry_state else None
        with autocast(self.precision, self.device):
            hidden, state = self.model.features(inputs, state, document_starts=batch.starts)
            loss = linear_cross_entropy(hidden, self.model.output.output.weight, targets)
        self.state = state.detach()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), t.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return loss.item(), norm.item()


def compile_blocks(model: Megalodon, device: torch.device) -> None:
    """Compile every block in place with torch.compile, at its first use; blocks of equal shapes share the code.

    Raises:
        ValueError: no C++ compiler, which the CPU needs.
    """
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ValueError("training.compile = true needs a C++ compiler; install g++ or set it to false") from None
    for block in model.layers:
        block.compile()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that no step is cut in half; the second one is immediate."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread
        before = {}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
