"""The trainer: reads documents, carries the State from step to step, and leaves a run that can be resumed."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.batches import Batch, prefetched
from ..errors import InputError
from ..files import write_atomically
from ..model.decoder import Megalodon
from ..ops.device import check_memory, choose_device
from ..state import State
from .checkpoint import Checkpoint, checkpoints, export, newest, prefixed, step_of, under
from .checkpoint_writer import CheckpointWriter
from .compiling import compile_blocks, compile_kernels
from .inputs import find_tokenizer, load_base, open_text
from .machine import product_rate
from .memory import resident
from .metrics import MetricsFile
from .optimizer import build_optimizer
from .precision import autocast, choose_precision
from .recipe import Recipe, TrainingRecipe
from .run_folder import RECIPE_FILE, Resume, begin_run, find_run, recorded_recipe
from .schedule import learning_rate

MOST_BAD_STEPS = 10  # skipped in a row, or gone back from to the same checkpoint, at which the run gives up
USUAL_LOSS_STEPS = 50  # of the running mean that spikes are measured from


@dataclass
class StepMetrics:
    """What one step did.

    Loss in bits per token, validation loss in bits per byte where it was measured, time in seconds of all steps so far,
    memory in resident bytes; utilisation is the model's operations per second over those of the machine's matrix
    products.
    """

    step: int
    tokens: int
    bits_per_token: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    seconds: float
    progress: float
    utilisation: float
    memory: int | None
    validation: float | None = None
    event: str = ""


class Trainer:
    """One training run, new or gone on with.

    Args:
        recipe: what to train on what.
        folder: of the run.
        device: where to train.
        resume: "no" needs a new or empty folder; "last" goes on from the newest checkpoint; "auto" does so where there
            is a run, passes over broken checkpoints, and begins where there is none.

    The folder is locked until `train` ends, and made only when all else is in order.

    Raises:
        InputError: unusable folder or device, broken checkpoint, another recipe, missing or changed text, or a
            vocabulary too small for the tokenizer.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, device: torch.device | str = "cpu", resume: Resume = "no"):
        self.recipe, self.device = recipe, choose_device(device)
        t = recipe.training
        recipe.check()  # also what was changed since it was read
        with torch.device("meta"):
            state_bytes = Megalodon(recipe.model).state_bytes(t.batch_size)
        activations = 4 * t.batch_size * t.length * recipe.model.model_dim  # of one of many
        check_memory(
            16 * recipe.model.num_parameters + state_bytes + activations,
            self.device, "this training", "lower the sizes in [model], training.batch_size or training.length",
        )  # fmt: skip
        with ExitStack() as undo:
            run = find_run(Path(folder), recipe, resume)
            checkpoint: Checkpoint | None = None
            self.notes: list[str] = []
            if run is not None:
                undo.callback(run.lock.release)
                checkpoint, self.notes = newest(run.folder, run.id, accept_older=resume == "auto")
            begun = run is not None and recorded_recipe(run.folder) is not None
            self.tokenizer = find_tokenizer(recipe, Path(folder) if begun else None)
            self.batches = open_text(recipe, self.tokenizer)
            self.cursor = self.batches.begin()
            base = load_base(recipe, self.tokenizer) if checkpoint is None else None
            torch.manual_seed(t.seed)
            with self.device:
                self.model = Megalodon(recipe.model, t.activation_checkpointing)
            if base is not None:
                self.model.load_state_dict(base.state_dict())
            if t.compile:
                compile_blocks(self.model, self.device)
            self.precision = choose_precision(t.precision, self.device)
            self.optimizer = build_optimizer(self.model, t, self.precision)
            self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()} if t.average else None
            self.state: State | None = None
            self.step = self.tokens = self.averaged_steps = 0
            self.saved_step: int | None = None
            self.seconds = self.warmup_seconds = 0.0
            self.usual_loss = math.nan
            self.best: tuple[float, int] | None = None
            self.went_back = (-1, 0)  # to which step, and how many times
            if checkpoint is not None:
                self.restore(checkpoint)
            if run is None:  # nothing can go wrong any more but the folder itself
                run = begin_run(Path(folder), any(s.of_chats for s in self.batches.mixture.sequences))
                undo.callback(run.lock.release)
            self.tokenizer.save(run.folder)
            write_atomically(run.folder / RECIPE_FILE, recipe.to_toml())
            self.run, self.folder = run, run.folder
            self.notes += [run.lock.note] if run.lock.note else []
            undo.pop_all()

    @property
    def progress(self) -> float:
        """Fraction of the run done, in time or in steps."""
        t = self.recipe.training
        return self.seconds / (60 * t.minutes) if t.minutes else self.step / t.steps

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        t = self.recipe.training
        warmup = self.warmup_seconds / (60 * t.minutes) if t.minutes else t.warmup_steps / t.steps
        return learning_rate(t, self.step, self.progress, warmup)

    def train(
        self,
        watch: Callable[[StepMetrics], None] = lambda metrics: None,
        validate: Callable[[Megalodon], float] | None = None,
    ) -> bool:
        """Run to the end of the recipe, or to an interrupt; either way a checkpoint is left.

        Args:
            watch: called after every step.
            validate: called with the model every validate_steps; the checkpoint with the lowest result is kept.

        Returns:
            Whether the run reached its end.

        Raises:
            InputError: the disk is full, or the loss is not finite or spikes and the recipe says to stop; the last
                checkpoint can be used.
            KeyboardInterrupt: interrupted in the last step; the run is whole.
        """
        t = self.recipe.training
        metrics = MetricsFile(self.folder)
        metrics.cut(self.step)
        writer = CheckpointWriter(self.folder, self.run.id, t.keep_checkpoints)
        operations = self.recipe.model.flops_per_token(backward=True) / product_rate(self.precision, self.device)
        saved, bad, event = time.perf_counter(), 0, ""
        self.model.train()
        try:
            with _interruptible() as interrupted, closing(prefetched(self.batches, self.cursor)) as batches:
                compile_kernels(self.model, self.precision, self.device, t)
                while self.progress < 1 and not interrupted():
                    writer.check()
                    began = time.perf_counter()
                    tokens = self.tokens
                    rate = self.learning_rate
                    trouble, loss, norm = self._step(batches, rate)
                    took = time.perf_counter() - began
                    self.step += 1
                    self.seconds += took
                    if self.step == t.warmup_steps:
                        self.warmup_seconds = self.seconds
                    bad = bad + 1 if trouble else 0
                    if trouble:
                        event = self._trouble(trouble, bad, writer, metrics)
                        if t.bad_step == "rewind":
                            continue
                    validation = None
                    if validate is not None and t.validate_steps and self.step % t.validate_steps == 0:
                        validation = self._validate(validate)
                    speed = (self.tokens - tokens) / took
                    record = StepMetrics(
                        self.step, self.tokens, loss / math.log(2), rate, norm, speed, self.seconds,
                        min(1.0, self.progress), speed * operations, resident(), validation, event,
                    )  # fmt: skip
                    metrics.write(asdict(record))
                    watch(record)
                    event = ""
                    now = time.perf_counter()
                    due = t.checkpoint_steps and self.step % t.checkpoint_steps == 0
                    if due or now - saved > 60 * t.checkpoint_minutes or self._is_best():
                        self._save(writer, metrics)
                        saved = now
            self._save(writer, metrics)
            writer.wait()
            for path in checkpoints(self.folder):
                if step_of(path) == self.step:  # a process may have been killed after it wrote this, before it exported
                    export(path, self.folder)
        finally:
            writer.close()
            metrics.close()
            self.run.lock.release()
        if self.progress >= 1 and interrupted():
            raise KeyboardInterrupt  # nothing is left to go on with, and what would come next is not wanted
        return self.progress >= 1

    def _step(self, batches: Iterator[Batch], rate: float) -> tuple[str, float, float]:
        """One step: what is wrong with it, its loss in nats per token, and the norm of the gradient before clipping."""
        t = self.recipe.training
        self.optimizer.zero_grad(set_to_none=True)
        parts = _taken(batches, accumulated(t, self.step))
        learnt = sum(batch.num_learnt for batch in parts)
        total = 0.0
        for batch in parts:
            self.cursor = batch.cursor
            inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
            share = batch.num_learnt / learnt
            with autocast(self.precision, self.device), torch.set_grad_enabled(share > 0):
                loss, state = self.model(
                    inputs, self.state, targets=targets, learnt=batch.learnt, document_starts=batch.starts
                )
            self.state = state.detach() if t.carry_state else None
            if share:
                (loss * share).backward()
                total += loss.item() * share
            self.tokens += inputs.numel()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), t.clip).item()
        if not math.isfinite(total + norm):
            return f"the loss is {total} and the gradient's norm {norm}", total, norm
        if t.spike and total > self.usual_loss + t.spike:
            return f"the loss is {total:.3f}, usually {self.usual_loss:.3f}", total, norm
        fresh = 1.0 if math.isnan(self.usual_loss) else 1 / min(self.step + 1, USUAL_LOSS_STEPS)
        self.usual_loss = total if fresh == 1.0 else self.usual_loss + fresh * (total - self.usual_loss)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        if self.average is not None:
            names, weights = zip(*self.model.named_parameters(), strict=True)
            self.averaged_steps += 1
            # The share that leaves no trace of the initial weights: decay d sums 1 + d + ... + d^(n - 1) over n steps.
            newest_share = (1 - t.average) / -math.expm1(self.averaged_steps * math.log(t.average))
            torch._foreach_lerp_([self.average[n] for n in names], [w.detach() for w in weights], newest_share)
        return "", total, norm

    def _save(self, writer: CheckpointWriter, metrics: MetricsFile) -> None:
        if self.saved_step != self.step:
            metrics.flush()
            writer.submit(self.checkpoint(), self.best and self.best[1])
            self.saved_step = self.step

    def _trouble(self, trouble: str, bad: int, writer: CheckpointWriter, metrics: MetricsFile) -> str:
        """Do with a bad step what the recipe says; the step itself changed no weight.

        Returns:
            What was done, for the record.
        """
        t, step = self.recipe.training, self.step
        advice = f"lower training.learning_rate = {t.learning_rate}, or raise training.warmup_steps"
        if t.bad_step == "stop":
            raise InputError(f"{trouble} at step {step}; {advice}, or set training.bad_step to skip or rewind")
        self.state = None  # what it carries may be spoilt
        if t.bad_step == "skip":
            if bad >= MOST_BAD_STEPS:
                raise InputError(f"{trouble} at step {step}, the {bad}th time in a row; {advice}")
            return f"skipped: {trouble}"
        writer.wait()
        checkpoint, _ = newest(self.folder, self.run.id, accept_older=True)
        if checkpoint is None:
            raise InputError(f"{trouble} at step {step}, and there is no checkpoint yet to go back to; {advice}")
        times = self.went_back[1] + 1 if self.went_back[0] == checkpoint.step else 1
        if times >= MOST_BAD_STEPS:
            raise InputError(f"{trouble} at step {step}, the {times}th time since step {checkpoint.step}; {advice}")
        self.went_back = (checkpoint.step, times)
        cursor, tokens, seconds = self.cursor, self.tokens, self.seconds
        self.restore(checkpoint)
        self.cursor, self.tokens, self.seconds = cursor, tokens, seconds  # past the batches that led here
        self.state = None
        metrics.cut(self.step)
        return f"went back from step {step}: {trouble}"

    def _validate(self, validate: Callable[[Megalodon], float]) -> float:
        with self.averaged():
            self.model.eval()
            result = validate(self.model)
            self.model.train()
        if self.best is None or result < self.best[0]:
            self.best = (result, self.step)
        return result

    def _is_best(self) -> bool:
        return self.best is not None and self.best[1] == self.step

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the averaged weights, if the recipe asks for them."""
        own = {n: p.detach().clone() for n, p in self.model.named_parameters()} if self.average else {}
        self._put(self.average or {})
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, weight in weights.items():
            parameters[name].copy_(weight)

    def checkpoint(self) -> Checkpoint:
        """Everything the run is now, copied."""
        weights: dict[str, Tensor] = dict(self.model.named_parameters())
        names = {parameter: name for name, parameter in weights.items()}
        training: dict[str, Tensor] = {"random": torch.get_rng_state()}
        if self.device.type == "cuda":
            training["random_cuda"] = torch.cuda.get_rng_state(self.device)
        for parameter, moments in self.optimizer.state.items():
            training |= prefixed(f"optimizer.{names[parameter]}", moments)
        if self.average is not None:
            training |= prefixed("weights", weights)
        if self.state is not None:
            training |= prefixed("state", self.state.used())
        progress = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "warmup_seconds": self.warmup_seconds,
            "averaged_steps": self.averaged_steps,
            "usual_loss": None if math.isnan(self.usual_loss) else self.usual_loss,
            "best": self.best,
            "place": self.cursor,
            "data": self.batches.fingerprint,
        }
        return Checkpoint(self.step, self.recipe.model, _copied(self.average or weights), _copied(training), progress)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Be what the run was at a checkpoint.

        Raises:
            InputError: the text is not the same.
        """
        progress, t = checkpoint.progress, self.recipe.training
        if progress["data"] != self.batches.fingerprint:
            raise InputError("the training text is not the one the run was begun with; restore it, or begin a new run")
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        if shapes != {name: weight.shape for name, weight in checkpoint.weights.items()}:
            raise InputError(f"the checkpoint of step {checkpoint.step} has other weights than the model of the recipe")
        raw = under("weights", checkpoint.training)
        self._put(raw or dict(checkpoint.weights))
        if self.average is not None:
            self.average = {name: weight.to(self.device) for name, weight in checkpoint.weights.items()}
        for name, parameter in self.model.named_parameters():
            moments = under(f"optimizer.{name}", checkpoint.training)
            if moments:
                self.optimizer.state[parameter] = {
                    key: value if key == "step" and self.device.type == "cpu" else value.to(self.device)
                    for key, value in moments.items()
                }
        carried = under("state", checkpoint.training)
        self.state = State.from_tensors(carried, self.model).to(self.device) if carried and t.carry_state else None
        torch.set_rng_state(checkpoint.training["random"])
        if self.device.type == "cuda" and "random_cuda" in checkpoint.training:
            torch.cuda.set_rng_state(checkpoint.training["random_cuda"], self.device)
        self.step = self.saved_step = checkpoint.step
        self.tokens, self.seconds = progress["tokens"], progress["seconds"]
        self.warmup_seconds = progress.get("warmup_seconds", 0.0)  # these two: not yet known to the first checkpoints
        self.averaged_steps = progress.get("averaged_steps", self.step)
        self.usual_loss = math.nan if progress["usual_loss"] is None else progress["usual_loss"]
        self.best = progress["best"] and tuple(progress["best"])
        self.cursor = progress["place"]


def _taken(batches: Iterator[Batch], count: int) -> list[Batch]:
    """The batches of a step: so many, and more until one has something to learn."""
    taken = [next(batches) for _ in range(count)]
    while not any(batch.num_learnt for batch in taken):
        taken.append(next(batches))
    return taken


def accumulated(recipe: TrainingRecipe, step: int) -> int:
    """Batches of a step: grows evenly from 1 to `accumulate` over `ramp_steps`."""
    if step >= recipe.ramp_steps:
        return recipe.accumulate
    return 1 + (recipe.accumulate - 1) * step // recipe.ramp_steps


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


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
