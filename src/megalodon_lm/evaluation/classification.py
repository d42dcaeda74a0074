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

WRITTEN_CLASSES = 20  # most whose counts have room in a picture or a table
NAMED_CLASSES = 60  # most whose names have room in a picture
LONGEST_NAME = 18  # letters of one there


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

    @property
    def by_class(self) -> NDArray[np.float64]:
        """(classes,), the part of each that is right; 0 where there are none."""
        return np.diag(self.counts) / np.maximum(self.counts.sum(1), 1)

    def figures(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "accuracy": self.accuracy,
            "interval": self.interval,
            "loss": self.loss,
            "examples": int(self.counts.sum()),
            "classes": self.classes,
            "confusion": self.counts.tolist(),
        }

    def markdown(self) -> str:
        """A line with the accuracy, and a table of the counts, or of many classes of the most frequent mistakes."""
        low, high = self.interval
        line = f"{self.accuracy:.2%} of {self.counts.sum():,} examples are right ({low:.2%} to {high:.2%})."
        names = [name.replace("|", "\\|") for name in self.classes]
        if len(names) > WRITTEN_CLASSES:
            wrong = self.counts - np.diag(np.diag(self.counts))
            places = np.argsort(-wrong, axis=None, kind="stable")[:WRITTEN_CLASSES]
            rows, columns = (part.tolist() for part in np.unravel_index(places, wrong.shape))
            pairs = [(i, j) for i, j in zip(rows, columns, strict=True) if wrong[i, j]]
            table = ["| true | predicted | times |", "|---|---|---|"]
            table += [f"| {names[i]} | {names[j]} | {wrong[i, j]} |" for i, j in pairs]
        else:
            table = ["| true \\ predicted | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
            counts = zip(names, self.counts.tolist(), strict=True)
            table += [f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in counts]
        return "\n".join([line, "", *table]) + "\n"


def draw_confusion(found: Confusion, path: Path) -> None:
    """A picture of which classes are taken for which: a row's parts of each class; and the part of each that is right.

    Raises:
        InputError: the path cannot be written.
    """
    parts = found.counts / np.maximum(found.counts.sum(1, keepdims=True), 1)
    count = len(found.classes)
    with picture(path, [["counts", "right"]], 5.0, width_ratios=[5, 2]) as axes:
        axis, numbers = axes["counts"], range(count)
        axis.imshow(parts, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axis.grid(False)
        if count <= NAMED_CLASSES:
            size = 10 if count <= WRITTEN_CLASSES else 6
            names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in found.classes]
            turned = 90 if count * max(map(len, names)) > 60 else 0
            axis.set_xticks(numbers, names, rotation=turned, fontsize=size)
            axis.set_yticks(numbers, names, fontsize=size)
        axis.set(xlabel="predicted", ylabel="true", title=f"{found.accuracy:.2%} right")
        for row, column in product(numbers, numbers) if count <= WRITTEN_CLASSES else ():
            colour = "white" if parts[row, column] > 0.5 else "black"
            text = f"{found.counts[row, column]}"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=10 if count <= 12 else 7)
        axis = axes["right"]
        axis.barh(numbers, found.by_class, color="tab:blue", height=0.8 if count <= NAMED_CLASSES else 1)
        axis.set(ylim=(count - 0.5, -0.5), xlim=(0, 1), yticks=[], title="of each class")
        axis.xaxis.set_major_formatter("{x:.0%}")


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
