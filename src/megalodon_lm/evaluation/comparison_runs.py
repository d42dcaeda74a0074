"""Carrying out a comparison: one run after the other, each in its folder, gone on with after whatever ended it."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..architectures import build, config_of
from ..data.corpus import Texts
from ..errors import Diverged, InputError
from ..files import make_folder, write_atomically
from ..model.language_model import LanguageModel
from ..tables import read_sealed, write_sealed
from ..training.checkpoint import discard
from ..training.machine import describe
from ..training.memory import forget_peak, resident
from ..training.metrics import read_metrics
from ..training.run_folder import recorded_recipe
from ..training.run_lock import InUse, RunLock
from ..training.trainer import Trainer
from .by_context import measure
from .comparison import Comparison, Run, best_rate, next_full_rate, next_rate
from .validation import Validation, beginning

RECIPE_FILE, RESULT_FILE = "comparison.toml", "result.json"
UNDISTURBED = 90
"""Percentile of the speeds of all steps that counts as the machine's when nothing else runs on it."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Result:
    """What came out of a run."""

    contender: str
    rate: float
    """Factor on the learning rates."""
    learning_rate: float
    """At the peak."""
    seed: int
    parameters: int
    state_bytes: int
    """Of a row of the model's State as it lies in memory."""
    flops_per_token: int
    """Forward and backward."""
    tokens: int
    """Learnt from."""
    seconds: float
    """Of all steps, as the clock showed them."""
    speed: float
    """Tokens a second of the fastest tenth of the steps, at least: what other programs took away is left out."""
    memory: int | None
    """Bytes that a step takes beyond weights and moments, at most; None where the system does not tell."""
    curve: list[list[float]]
    """[tokens, bits per byte] of each validation."""
    diverged: str
    """What went wrong; empty where all was well."""
    documents: dict[str, Any]
    """By reading, "" for the model as it is: what perplexity by context says, and the speed of reading."""
    data: str
    """Fingerprint of the text and its order."""
    machine: dict[str, Any]
    """It was made on."""
    measured: dict[str, Any]
    """Settings of [compare] that say on what."""

    @property
    def validation(self) -> float:
        """Bits per byte at the end of the training; infinite where it diverged."""
        return math.inf if self.diverged or not self.curve else self.curve[-1][1]

    @property
    def bits_per_byte(self) -> float:
        """Of the documents afterwards, with the longest context; infinite where it diverged."""
        return self.by_context()[max(self.by_context())] if self.by_context() else math.inf

    def by_context(self, reading: str = "") -> dict[int, float]:
        """Bits per byte by context in tokens."""
        found = self.documents.get(reading, {}).get("bits_per_byte_by_context", {})
        return {int(context): value for context, value in found.items()}


def find(comparison: Comparison, run: Run, out: Path) -> Result | None:
    """What an earlier process made of a run; None where it is not there, or not finished.

    Raises:
        InputError: it is another run, or the file is damaged.
    """
    folder = out / run.folder
    before = recorded_recipe(folder)
    if before is not None and before != run.recipe:
        raise InputError(f"{folder} is a run of another recipe; take another --out, or delete it")
    if before is None or not (folder / RESULT_FILE).exists():
        return None
    found = _read(folder)
    if not run.tuning and found.measured != _measured(comparison):
        raise InputError(
            f"{folder} was measured on {found.measured}; take another --out, or the same documents and contexts"
        )
    return found


def _read(folder: Path) -> Result:
    try:
        return Result(**read_sealed(folder / RESULT_FILE))
    except TypeError:
        raise InputError(f"{folder / RESULT_FILE} is of another version; begin in another folder") from None


def tuned(comparison: Comparison, name: str, out: Path) -> tuple[dict[float, float], float | None]:
    """The rates of a contender that were tried: what each led to in bits per byte, and which is to be tried next."""
    grid, tried = comparison.contenders[name].rates, dict[float, float]()
    while (rate := next_rate(grid, tried, comparison.settings.most_rates)) is not None:
        result = find(comparison, comparison.tuning(name, rate), out)
        if result is None:
            return tried, rate
        tried[rate] = result.validation
    return tried, None


def settled(comparison: Comparison, name: str, out: Path) -> tuple[dict[float, float], float | None]:
    """The rates of a contender that were tried with all steps and the first seed, as `tuned`, which has to be done."""
    grid, tried = comparison.contenders[name].rates, dict[float, float]()
    start = best_rate(grid, tuned(comparison, name, out)[0])
    while (rate := next_full_rate(start, tried, comparison.settings.full_rates)) is not None:
        result = find(comparison, comparison.full(name, rate, 0), out)
        if result is None:
            return tried, rate
        tried[rate] = result.validation
    return tried, None


def plain_training(trainer: Trainer) -> bool:
    """Train without showing anything."""
    t, data = trainer.recipe.training, trainer.recipe.data
    return trainer.train(validate=Validation(data.validation, t.validate_bytes, trainer.tokenizer, trainer.precision))


def carry_out_all(
    comparison: Comparison,
    out: Path,
    names: Sequence[str],
    device: torch.device = CPU,
    train: Callable[[Trainer], bool] = plain_training,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Result]:
    """Make all runs that are not there yet: first all that try rates, then all with the first seed, and so on.

    A run that was interrupted or killed goes on from its last checkpoint. A contender that another process is at work
    on is passed over.

    Args:
        comparison: what to run.
        out: its folder, made if it is not there.
        names: of the contenders to run.
        device: where.
        train: trains to the end, and tells whether it was reached.
        say: told in a line what is done.

    Yields:
        What was made now.

    Raises:
        InputError: the folder cannot be written, or holds other runs; or what a Trainer raises.
        KeyboardInterrupt: interrupted; the run in hand is saved.
    """
    Texts(comparison.settings.documents)
    make_folder(out)
    write_atomically(out / RECIPE_FILE, comparison.to_toml())
    rounds = [None, *range(max(comparison.contenders[name].seeds for name in names))]
    for seed in rounds:
        for name in names:
            if seed is not None and seed >= comparison.contenders[name].seeds:
                continue
            make_folder(out / name)
            try:
                lock = RunLock(out / name)
            except InUse:
                say(f"{name}: another process is at work on it")
                continue
            try:
                yield from _carry_out(comparison, out, name, seed, device, train, say)
            finally:
                lock.release()


def _carry_out(
    comparison: Comparison,
    out: Path,
    name: str,
    seed: int | None,
    device: torch.device,
    train: Callable[[Trainer], bool],
    say: Callable[[str], None],
) -> Iterator[Result]:
    """Find the rate of a contender, and make its run with a seed."""
    for finished in (out / name).glob(f"*/{RESULT_FILE}"):
        discard(finished.parent)  # what a process that was killed then has left
    while (rate := tuned(comparison, name, out)[1]) is not None:
        yield carry_out(comparison, comparison.tuning(name, rate), out, device, train, say)
    if seed is None:
        return
    while (rate := settled(comparison, name, out)[1]) is not None:
        yield carry_out(comparison, comparison.full(name, rate, 0), out, device, train, say)
    run = comparison.full(name, best_rate((), settled(comparison, name, out)[0]), seed)
    if find(comparison, run, out) is None:
        yield carry_out(comparison, run, out, device, train, say)


def carry_out(
    comparison: Comparison,
    run: Run,
    out: Path,
    device: torch.device = CPU,
    train: Callable[[Trainer], bool] = plain_training,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Train, or go on training, and measure; arguments as for carry_out_all.

    The result is kept in the run's folder; the weights stay, checkpoints do not.
    """
    say(run.title)
    folder = out / run.folder
    trainer, diverged = Trainer(run.recipe, folder, device, resume="auto"), ""
    try:
        if not train(trainer):
            raise KeyboardInterrupt
    except Diverged as error:
        diverged = str(error)
        say(f"{run.title}: diverged: {error}")
    records, documents = read_metrics(folder), dict[str, Any]()
    if not run.tuning and not diverged:
        say(f"{run.title}: reading the documents")
        try:
            documents = _read_documents(comparison, run, trainer)
        except Diverged as error:
            diverged = str(error)
            say(f"{run.title}: {error}")
    config, speeds = run.recipe.model, [r["tokens_per_second"] for r in records if r["tokens_per_second"]]
    validations = [r for r in records if r["validation"] is not None]
    result = Result(
        contender=run.contender,
        rate=run.rate,
        learning_rate=run.recipe.training.learning_rate,
        seed=run.seed,
        parameters=config.num_parameters,
        state_bytes=trainer.model.state_bytes(),
        flops_per_token=config.flops_per_token(backward=True),
        tokens=trainer.tokens,
        seconds=trainer.seconds,
        speed=float(np.percentile(speeds, UNDISTURBED)) if speeds else 0.0,
        memory=_step_memory(trainer),
        curve=[[r["tokens"], r["validation"]] for r in validations],
        diverged=diverged,
        documents=documents,
        data=trainer.batches.fingerprint,
        machine=describe(trainer.precision, trainer.device),
        measured=_measured(comparison),
    )
    write_sealed(folder / RESULT_FILE, asdict(result))
    discard(folder)
    return _read(folder)


def _step_memory(trainer: Trainer) -> int | None:
    """Most bytes that a step needs beyond what is there before and after it: activations and gradients.

    By itself, and not while training: what a process that has just begun loads and compiles is no part of it.
    """
    if trainer.device.type != "cpu":
        return None
    batch, taken = trainer.batches.read(trainer.batches.begin()), None
    trainer.model.train()
    for _ in range(2):  # the first one may still load
        trainer.optimizer.zero_grad(set_to_none=True)
        forget_peak()
        before = resident()
        trainer.passes(batch, trainer.state, batch.num_learnt)
        peak = resident(peak=True)
        taken = None if before is None or peak is None else max(0, peak - before)
    return taken


def _read_documents(comparison: Comparison, run: Run, trainer: Trainer) -> dict[str, Any]:
    """By reading, what the trained model makes of the documents."""
    s, found = comparison.settings, dict[str, Any]()
    texts = Texts(s.documents)
    with trainer.averaged():
        others = {} if run.seed else comparison.contenders[run.contender].readings
        readings = {"": trainer.model} | {name: _other(trainer.model, changes) for name, changes in others.items()}
        for name, model in readings.items():
            begun, tokens = time.perf_counter(), 0
            curve = measure(
                model.eval(),
                lambda: beginning(texts, s.document_bytes),
                trainer.tokenizer,
                s.contexts,
                trainer.precision,
            )
            tokens = sum(losses.tokens for losses in curve.losses.values())
            found[name] = curve.figures() | {
                "bytes": curve.num_bytes, "tokens_per_second": tokens / (time.perf_counter() - begun),
            }  # fmt: skip
    return found


def _other(model: LanguageModel, changes: dict[str, Any]) -> LanguageModel:
    """A model with the same weights and another configuration."""
    with model.device:
        other = build(config_of(model.config.to_dict() | changes))
    other.load_state_dict(model.state_dict())
    return other


def _measured(comparison: Comparison) -> dict[str, Any]:
    s = comparison.settings
    return {"documents": s.documents, "document_bytes": s.document_bytes, "contexts": s.contexts}
