"""The trainer: reads documents, carries the State from step to step, and leaves a run that can be resumed."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch

from ..architectures import build
from ..data.batches import Batch, prefetched
from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..files import write_atomically
from ..interrupts import interruptible
from ..model.language_model import LanguageModel
from ..ops.device import choose_device
from ..parallel.ranks import Ranks, whole
from ..state import State
from .averaging import WeightAverage
from .bad_steps import BadSteps
from .checkpoint import Checkpoint, checkpoints, export, newest
from .checkpoint_writer import CheckpointWriter
from .compiling import compile_blocks, compile_kernels
from .inputs import Subject, Text, check_size
from .machine import product_rate
from .manifest import step_of
from .memory import resident
from .metrics import MetricsFile, StepMetrics
from .optimizer import build_optimizer
from .passes import shared
from .precision import choose_precision
from .recipe import Recipe
from .run_folder import RECIPE_FILE, Resume, Run, begin_run, find_run, recorded_recipe
from .run_lock import NoLock
from .schedule import accumulated, learning_rate
from .snapshot import capture, reinstate
from .unwritten import Unwritten


class Trainer:
    """One training run, new or gone on with.

    Args:
        recipe: what to train on what.
        folder: of the run.
        device: where to train.
        resume: "no" needs a new or empty folder; "last" goes on from the newest checkpoint; "auto" does so where there
            is a run, passes over broken checkpoints, and begins where there is none.
        subject: what is learnt; None for the text that the recipe names.
        ranks: that train together, each with a Trainer of the same recipe and folder; the first one writes.

    The folder is locked until `train` ends, and made only when all else is in order.

    Raises:
        InputError: unusable folder or device, broken checkpoint, another recipe, missing or changed text, or a
            vocabulary too small for the tokenizer.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: str | Path,
        device: torch.device | str = "cpu",
        resume: Resume = "no",
        subject: Subject | None = None,
        ranks: Ranks | None = None,
    ):
        self.recipe, self.device = recipe, choose_device(device)
        self.ranks = ranks or Ranks()
        self.ranks.rows(recipe.training.batch_size)  # are there enough for all?
        t = recipe.training
        recipe.check()  # also what was changed since it was read
        check_size(recipe, self.device)
        with ExitStack() as undo:
            run = self.ranks.agreeing(lambda: find_run(Path(folder), recipe, resume, self.ranks.is_first))
            checkpoint: Checkpoint | None = None
            self.notes: list[str] = []
            if run is not None:
                undo.callback(run.lock.release)
                checkpoint, self.notes = newest(run.folder, run.id, resume == "auto", self.ranks)
            begun = run is not None and recorded_recipe(run.folder, type(recipe)) is not None
            self.subject = subject or Text(recipe, Path(folder) if begun else None)
            self.batches = self.subject.batches
            self.cursor = self.batches.begin()
            base = self.subject.base() if checkpoint is None else None
            torch.manual_seed(t.seed)
            with self.device:
                self.model = build(recipe.model, t.activation_checkpointing)
            if base is not None:
                self.model.load_state_dict(base.state_dict())
            compiling = (lambda model: compile_blocks(model, self.device)) if t.compile else None
            self.reader = self.ranks.apply(self.model, compiling)
            self.precision = choose_precision(t.precision, self.device)
            own = self.subject.passes(self.reader, self.precision, self.device, self.ranks.ranks > 1)
            self.passes = shared(own, self.ranks)
            self.optimizer = build_optimizer(self.model, t, self.precision)
            self.average = WeightAverage(self.model, t.average) if t.average else None
            self.bad_steps = BadSteps(t)
            self.state: State | None = None
            self.step = self.tokens = 0
            self.saved_step: int | None = None
            self.seconds = self.warmup_seconds = 0.0
            self.best: tuple[float, int] | None = None
            if checkpoint is not None:
                self.restore(checkpoint)
            else:
                self.ranks.own_random_numbers(t.seed)
            self.ranks.wait()  # until all have looked at the folder
            opened = self.ranks.agreeing(lambda: self._opened(run, Path(folder), undo) if self.ranks.is_first else None)
            run_id = self.ranks.each(lambda: opened.id if opened else "")[0]
            self.run = opened or Run(Path(folder), run_id, NoLock())
            self.folder = self.run.folder
            self.notes += [self.run.lock.note] if self.run.lock.note else []
            undo.pop_all()

    def _opened(self, run: Run | None, folder: Path, undo: ExitStack) -> Run:
        """The run, begun if there is none; nothing can go wrong any more but the folder itself."""
        if run is None:
            run = begin_run(folder, self.subject.of_chats)
            undo.callback(run.lock.release)
        self.subject.save(run.folder)
        write_atomically(run.folder / RECIPE_FILE, self.recipe.to_toml())
        return run

    @property
    def tokenizer(self) -> Tokenizer:
        """Of a text."""
        assert isinstance(self.subject, Text)
        return self.subject.tokenizer

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
        validate: Callable[[LanguageModel], float] | None = None,
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
            Exception: what reading or `validate` raised; one process alone leaves a checkpoint of the step before.
            KeyboardInterrupt: interrupted in the last step; the run is whole.
        """
        t = self.recipe.training
        first = self.ranks.is_first
        metrics = MetricsFile(self.folder) if first else Unwritten()
        metrics.cut(self.step)
        writer = CheckpointWriter(self.folder, self.run.id, t.keep_checkpoints, self.ranks)
        operations = self.recipe.model.flops_per_token(backward=True) / product_rate(self.precision, self.device)
        (saved,), event = self.ranks.agreed([time.perf_counter()]), ""
        self.model.train()
        try:
            with interruptible() as interrupted, closing(prefetched(self.batches, self.cursor)) as batches:
                compile_kernels(self.model, self.passes, self.device, self.subject.trials(), t.carry_state)
                while self.progress < 1 and not self.ranks.any(interrupted() or writer.failed()):
                    began = time.perf_counter()
                    tokens = self.tokens
                    rate = self.learning_rate
                    try:
                        parts = _taken(batches, accumulated(t, self.step))
                    except Exception:
                        self._keep(writer, metrics)
                        raise
                    trouble, loss, norm = self._step(parts, rate)
                    took, now = self.ranks.agreed([time.perf_counter() - began, time.perf_counter()])
                    self.step += 1
                    self.seconds += took
                    if self.step == t.warmup_steps:
                        self.warmup_seconds = self.seconds
                    if trouble:
                        event = self._recover(trouble, writer, metrics, event)
                        if t.bad_step == "rewind":
                            continue
                    validation, wrong = None, None
                    if validate is not None and t.validate_steps and self.step % t.validate_steps == 0:
                        try:
                            validation = self._validate(validate)
                        except Exception as error:
                            wrong = error
                    speed = (self.tokens - tokens) / took
                    record = StepMetrics(
                        self.step, self.tokens, loss / math.log(2), rate, norm, speed, self.seconds,
                        min(1.0, self.progress), speed * operations, resident(), validation, event,
                    )  # fmt: skip
                    metrics.write(asdict(record))
                    watch(record)
                    if wrong is not None:
                        self._keep(writer, metrics)
                        raise wrong
                    event = ""
                    due = t.checkpoint_steps and self.step % t.checkpoint_steps == 0
                    if due or now - saved > 60 * t.checkpoint_minutes or self._is_best():
                        self._save(writer, metrics)
                        saved = now
            self._save(writer, metrics)
            writer.wait()
            self.ranks.agreeing(lambda: self._export() if first else None)
        finally:
            writer.close()
            metrics.close()
            self.run.lock.release()
        if self.progress >= 1 and self.ranks.any(interrupted()):
            raise KeyboardInterrupt  # nothing is left to go on with, and what would come next is not wanted
        return self.progress >= 1

    def _step(self, parts: Sequence[Batch], rate: float) -> tuple[str, float, float]:
        """One step: what is wrong with it, its loss in nats per token, and the norm of the gradient before clipping."""
        t = self.recipe.training
        self.optimizer.zero_grad(set_to_none=True)
        learnt = sum(batch.num_learnt for batch in parts)
        total = 0.0
        for batch in parts:
            self.cursor = batch.cursor
            loss, state = self.passes(batch, self.state, learnt)
            self.state = state if t.carry_state else None
            total += loss
            self.tokens += batch.num_read
        self.ranks.sum_gradients(self.model)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), t.clip)).item()
        if trouble := self.bad_steps.judge(self.step, total, norm):
            return trouble, total, norm
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        return "", total, norm

    def _export(self) -> None:
        """Put the model into the folder; a process may have been killed after it wrote the checkpoint, before this."""
        for path in checkpoints(self.folder):
            if step_of(path) == self.step:
                export(path, self.folder)

    def _save(self, writer: CheckpointWriter, metrics: MetricsFile | Unwritten) -> None:
        if self.saved_step != self.step:
            metrics.flush()
            writer.submit(self.checkpoint(), self.best and self.best[1])
            self.saved_step = self.step

    def _keep(self, writer: CheckpointWriter, metrics: MetricsFile | Unwritten) -> None:
        """Save what was learnt before an error ends the run; not among ranks, of which others may know of none."""
        if self.ranks.ranks == 1 and self.step:
            with suppress(InputError):  # the first error is the one to tell
                self._save(writer, metrics)
                writer.wait()

    def _recover(self, trouble: str, writer: CheckpointWriter, metrics: MetricsFile | Unwritten, event: str) -> str:
        """Do with a bad step what the recipe says; the step itself changed no weight.

        Args:
            trouble: what is wrong with it.
            writer, metrics: of the run.
            event: that no record tells of yet.

        Returns:
            What was done, for the record.
        """
        self.state = None  # what it carries may be spoilt
        if self.recipe.training.bad_step != "rewind":
            return self.bad_steps.pass_over(trouble, self.step)
        writer.wait()
        checkpoint, _ = newest(self.folder, self.run.id, accept_older=True, ranks=self.ranks)
        went_back = self.bad_steps.go_back(trouble, self.step, None if checkpoint is None else checkpoint.step)
        assert checkpoint is not None
        cursor, tokens, seconds = self.cursor, self.tokens, self.seconds
        self.restore(checkpoint)
        self.cursor, self.tokens, self.seconds = cursor, tokens, seconds  # past the batches that led here
        self.state = None
        return "; ".join(filter(None, [*metrics.cut(self.step), event, went_back]))  # also what was cut away told of

    def _validate(self, validate: Callable[[LanguageModel], float]) -> float:
        with self.averaged():
            self.model.eval()
            try:
                (result,) = self.ranks.agreed([validate(self.reader)])
            finally:
                self.model.train()
        if self.best is None or result < self.best[0]:
            self.best = (result, self.step)
        return result

    def _is_best(self) -> bool:
        return self.best is not None and self.best[1] == self.step

    def averaged(self) -> AbstractContextManager[None]:
        """The model with the averaged weights, if the recipe asks for them."""
        return nullcontext() if self.average is None else self.average.applied(self.model)

    def checkpoint(self) -> Checkpoint:
        """Everything the run is now, as far as this rank holds it, copied."""
        rows = self.recipe.training.batch_size
        weights, training = capture(self.model, self.optimizer, self.average, self.state, self.ranks, rows)
        usual_loss = self.bad_steps.usual_loss
        progress = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "warmup_seconds": self.warmup_seconds,
            "averaged_steps": self.average.steps if self.average else 0,
            "usual_loss": None if math.isnan(usual_loss) else usual_loss,
            "bad_steps_in_a_row": self.bad_steps.in_a_row,
            "best": self.best,
            "place": self.cursor,
            "data": self.batches.fingerprint,
        }
        return Checkpoint(self.step, self.recipe.model, weights, training, progress)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Be what the run was at a checkpoint.

        Raises:
            InputError: the text is not the same.
        """
        progress = checkpoint.progress
        if progress["data"] != self.batches.fingerprint:
            raise InputError("the training text is not the one the run was begun with; restore it, or begin a new run")
        t = self.recipe.training
        self.ranks.own_random_numbers(t.seed + checkpoint.step)
        carried = reinstate(checkpoint, self.model, self.optimizer, self.average, self.ranks, t.batch_size)
        self.state = carried if t.carry_state else None
        self.step = self.saved_step = checkpoint.step
        self.tokens, self.seconds = progress["tokens"], progress["seconds"]
        self.warmup_seconds = progress.get("warmup_seconds", 0.0)  # these three: not known to the first checkpoints
        self.bad_steps.in_a_row = progress.get("bad_steps_in_a_row", 0)
        if self.average is not None:
            self.average.steps = progress.get("averaged_steps", self.step)
        self.bad_steps.usual_loss = math.nan if progress["usual_loss"] is None else progress["usual_loss"]
        self.best = progress["best"] and tuple(progress["best"])
        self.cursor = progress["place"]


def _taken(batches: Iterator[Batch], count: int) -> list[Batch]:
    """The batches of a step: so many, and more until one has something to learn."""
    taken = [next(batches) for _ in range(count)]
    while not any(batch.num_learnt for batch in taken):
        taken.append(next(batches))
    return taken
