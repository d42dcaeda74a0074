"""How often an encoder is right, and where it is wrong."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.example_batches import in_order, inputs_of
from ..data.examples import Examples, Form
from ..errors import InputError
from ..plots import picture
from ..training.precision import autocast
from .intervals import wilson

WRITTEN_CLASSES = 20  # most whose counts have room in a picture


@dataclass(frozen=True)
class Confusion:
    """Counts of examples, by their class and the one predicted.

    Attributes:
        counts: (classes, classes) int64, rows being what is true.
        classes: their names.
        loss: mean nats.
    """

    counts: NDArray[np.int64]
    classes: tuple[str, ...]
    loss: float

    @property
    def accuracy(self) -> float:
        """Part that is right."""
        return float(np.trace(self.counts) / self.counts.sum())

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, Wilson's at 95 %."""
        return wilson(int(np.trace(self.counts)), int(self.counts.sum()))

    def markdown(self) -> str:
        """A table of the counts under a line with the accuracy."""
        low, high = self.interval
        lines = [f"{self.accuracy:.2%} of {self.counts.sum():,} examples are right ({low:.2%} to {high:.2%}).", ""]
        lines += ["| true \\ predicted | " + " | ".join(self.classes) + " |", "|---" * (len(self.classes) + 1) + "|"]
        rows = zip(self.classes, self.counts.tolist(), strict=True)
        return "\n".join([*lines, *(f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in rows)]) + "\n"


def draw_confusion(found: Confusion, path: Path) -> None:
    """A picture of which classes are taken for which: a row's parts of each class, the counts written in.

    Raises:
        InputError: the path cannot be written.
    """
    parts = found.counts / np.maximum(found.counts.sum(1, keepdims=True), 1)
    with picture(path, [["counts"]], 5.0) as axes:
        axis, numbers = axes["counts"], range(len(found.classes))
        axis.imshow(parts, cmap="Blues", vmin=0, vmax=1)
        axis.grid(False)
        axis.set(xticks=numbers, yticks=numbers, xticklabels=found.classes, yticklabels=found.classes)
        axis.set(xlabel="predicted", ylabel="true", title=f"{found.accuracy:.2%} right")
        for row, column in product(numbers, numbers) if len(found.classes) <= WRITTEN_CLASSES else ():
            colour = "white" if parts[row, column] > 0.5 else "black"
            axis.text(column, row, f"{found.counts[row, column]}", ha="center", va="center", color=colour)


@torch.inference_mode()
def confusion(
    model: Any, examples: Examples, form: Form, precision: Literal["bf16", "float32"], batch_size: int = 32
) -> Confusion:
    """Classify examples.

    Args:
        model: an Encoder in evaluation mode.
        examples: with the classes of the form.
        form: of what the model takes.
        precision: of the products.
        batch_size: examples at a time.
    """
    number, device = len(form.classes), model.device
    counts, loss = np.zeros((number, number), np.int64), 0.0
    for _, batch in in_order(examples, form, batch_size):
        mask = None if batch.mask is None else batch.mask.to(device)
        with autocast(precision, device):
            logits, _ = model(batch.inputs.to(device), mask=mask)
        loss += torch.nn.functional.cross_entropy(logits.cpu(), batch.targets, reduction="sum").item()
        np.add.at(counts, (batch.targets.numpy(), logits.argmax(-1).cpu().numpy()), 1)
    return Confusion(counts, form.classes, loss / len(examples.raw))


@dataclass
class ErrorRate:
    """The part of validation examples that a model gets wrong, for the trainer to watch.

    Args:
        examples, form, precision: see confusion.
    """

    examples: Examples
    form: Form
    precision: Literal["bf16", "float32"]

    def __call__(self, model: Any) -> float:
        """From 0 to 1."""
        return 1 - confusion(model, self.examples, self.form, self.precision).accuracy


class Decision(NamedTuple):
    """What a sound is, by what was heard of it.

    Attributes:
        heard: samples.
        probabilities: (classes,).
        seconds: from the last of these samples to the decision.
    """

    heard: int
    probabilities: Tensor
    seconds: float


@torch.inference_mode()
def decisions(model: Any, form: Form, blocks: Iterable[NDArray[Any]]) -> Iterator[Decision]:
    """What a sound that comes in is, after each block of it: as the whole so far would be classified.

    Args:
        model: an Encoder in evaluation mode, of `direction = "forward"`.
        form: of what it takes.
        blocks: samples, of whole patches but for the last.

    Raises:
        InputError: the model must see the whole sound at once.
    """
    if model.config.direction != "forward":
        raise InputError('this model hears whole sounds alone; one of direction = "forward" decides while they come in')
    state, heard = None, 0
    for block in blocks:
        heard += len(block)
        began = time.perf_counter()
        logits, state = model(torch.from_numpy(form.steps(block))[None].to(model.device), state)
        yield Decision(heard, logits[0].softmax(-1).cpu(), time.perf_counter() - began)


@torch.inference_mode()
def probabilities(model: Any, form: Form, raw: NDArray[Any]) -> Tensor:
    """Those of the classes of one example; arguments as of decisions."""
    inputs, mask = inputs_of([raw], form)
    logits, _ = model(inputs.to(model.device), mask=None if mask is None else mask.to(model.device))
    return logits[0].softmax(-1).cpu()
