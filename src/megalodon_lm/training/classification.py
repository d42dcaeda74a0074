"""Training an encoder on examples with classes: the recipe, and what the trainer learns by it."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch

from ..data.augmentation import Augmentation
from ..data.example_batches import ExampleBatch, ExampleBatches
from ..data.example_files import Taking
from ..data.example_sources import load_examples
from ..data.examples import Examples, Form, joined
from ..errors import InputError
from ..files import write_atomically
from ..model.encoder_config import EncoderConfig
from ..parallel.mesh import MeshSizes
from ..state import State
from .passes import Passed
from .precision import autocast
from .recipe import TABLES, Recipe, TrainingRecipe, check_keys, fill, table_of

FORM_FILE = "examples.json"


@dataclass
class ExamplesRecipe:
    """The examples; see data.example_sources.load_examples for what a source may be."""

    train: list[str] = field(default_factory=list)
    """Sources of training examples."""
    validation: list[str] = field(default_factory=list)
    """Sources of validation examples; nothing where some of the others are held out."""
    label: str = ""
    """Of folders: a regular expression whose first group is the class in a file's name; empty for class folders."""
    held_out: str = ""
    """A regular expression: training examples whose names it is found in are for validation."""
    held_out_part: float = 0.1
    """The part of the training examples that is for validation, at random, where neither of the above says which."""
    patch: int = 1
    """Samples in a row, or the side of a square of pixels, that make a step."""
    side: int = 0
    """Pixels: picture files are scaled and cut to squares of this side; 0 for pictures of one size, as they are."""
    colour: bool = False
    """Picture files have three values a pixel instead of grey levels."""
    longest: int = 0
    """Bytes of a text that are read; 0 for all."""
    distinct: bool = False
    """Training examples that are among those of validation too are left out."""

    @property
    def taking(self) -> Taking:
        """How files are taken."""
        return Taking(self.label, self.side, self.colour, self.longest)


@dataclass
class ClassificationRecipe(Recipe):
    """A training run of an encoder. What the examples decide of it, `Classification` fills in."""

    tables: ClassVar[tuple[str, ...]] = (*TABLES, "augmentation")
    model: EncoderConfig
    data: ExamplesRecipe = field(default_factory=ExamplesRecipe)  # type: ignore[assignment]
    augmentation: Augmentation = field(default_factory=Augmentation)

    @classmethod
    def from_dict(cls, values: dict[str, Any], begun: Recipe | None = None) -> Self:
        """From plain values; [model] may name a size, `size = "image"`, and change single choices of it."""
        check_keys("recipe", values, cls.tables)
        data = fill(ExamplesRecipe, "data", table_of(values, "data"))
        training = fill(TrainingRecipe, "training", {"carry_state": False, **table_of(values, "training")})
        augmentation = fill(Augmentation, "augmentation", table_of(values, "augmentation"))
        model = dict(table_of(values, "model"))
        size = model.pop("size", None)
        config = EncoderConfig.from_dict(model) if size is None else EncoderConfig.named(size, **model)
        if fill(MeshSizes, "mesh", table_of(values, "mesh")) != MeshSizes():
            raise InputError("the table [mesh] is of language models; leave it out")
        recipe = cls(config, data, training, augmentation=augmentation)
        recipe.check()
        return recipe

    def check(self) -> None:
        """See Recipe.check."""
        self.check_values()
        d, t = self.data, self.training
        if not d.train:
            raise InputError("data.train must name a source of examples")
        if not 0 < d.held_out_part < 1:
            raise InputError(f"data.held_out_part = {d.held_out_part} must be between 0 and 1")
        if d.patch < 1:
            raise InputError(f"data.patch = {d.patch} must be at least 1")
        try:
            re.compile(d.held_out)
        except re.error as error:
            raise InputError(f"data.held_out = {d.held_out!r} is no regular expression: {error}") from None
        for key in ("side", "longest"):
            if (value := getattr(d, key)) < 0:
                raise InputError(f"data.{key} = {value} must not be negative")
        self.augmentation.check()
        for key in ("begin_from", "segment", "carry_state"):
            if value := getattr(t, key):
                raise InputError(f"training.{key} = {value!r} is of texts; leave it out")


@dataclass(frozen=True)
class ClassificationPass:
    """All of a batch at once: see passes.Pass.

    Args:
        model: to train.
        precision: of its products.
        device: where it is.
    """

    model: Any
    precision: Literal["bf16", "float32"]
    device: torch.device

    def __call__(self, batch: ExampleBatch, state: State | None, learnt: int) -> Passed:
        """Add a batch's share of the gradients."""
        share = batch.num_learnt / learnt
        mask = None if batch.mask is None else batch.mask.to(self.device)
        inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        with autocast(self.precision, self.device):
            loss, _ = self.model(inputs, targets=targets, mask=mask)
        (loss * share).backward()
        return Passed(loss.item() * share, None)


class Classification:
    """Examples to learn from and to measure on: see inputs.Subject. The recipe's model takes what they decide.

    Args:
        recipe: of the run.

    Raises:
        InputError: missing or malformed sources, nothing to measure on, or fewer examples than a batch has.
    """

    of_chats = False

    def __init__(self, recipe: ClassificationRecipe):
        d, t = recipe.data, recipe.training
        examples = joined([load_examples(source, d.taking) for source in d.train])
        if d.validation:
            parts = [load_examples(source, d.taking).with_classes(examples.classes) for source in d.validation]
            self.train, self.validation = examples, joined(parts)
        else:
            self.train, self.validation = _parted(examples, d, t.seed)
        if d.distinct:
            self.train = self.train.without(self.validation)
            if not len(self.train.raw):
                raise InputError("data.distinct leaves no training examples: all are among those of validation")
        self.form = self.train.form(d.patch)
        self.form.check(self.validation)
        recipe.augmentation.check(self.form.kind)
        self.batches = ExampleBatches(self.train, self.form, t.batch_size, t.seed, recipe.augmentation)
        decided = {**self.form.input, "num_classes": len(self.form.classes)}
        recipe.model = dataclasses.replace(recipe.model, **decided)

    def base(self) -> None:
        """Nothing: weights are drawn."""

    def passes(self, model: Any, precision: Literal["bf16", "float32"], device: torch.device, in_step: bool) -> Any:
        """See ClassificationPass: every batch has something to learn."""
        return ClassificationPass(model, precision, device)

    def trials(self) -> list[ExampleBatch]:
        """The first batch."""
        return [self.batches.read(self.batches.begin())]

    def save(self, folder: Path) -> None:
        """The form of the examples."""
        save_form(self.form, folder)


def _parted(examples: Examples, recipe: ExamplesRecipe, seed: int) -> tuple[Examples, Examples]:
    """Those to learn from, and those held out."""
    count = len(examples.raw)
    if recipe.held_out:
        held = np.array([re.search(recipe.held_out, Path(name).name) is not None for name in examples.names])
    else:
        held = np.zeros(count, bool)
        held[np.random.default_rng([seed, count]).permutation(count)[: round(recipe.held_out_part * count)]] = True
    if held.all() or not held.any():
        raise InputError(f"{int(held.sum())} of {count} examples would be held out; change data.held_out")
    return examples.take(np.flatnonzero(~held)), examples.take(np.flatnonzero(held))


def save_form(form: Form, folder: Path) -> None:
    """Write what a model's examples are made of beside it."""
    write_atomically(folder / FORM_FILE, json.dumps(dataclasses.asdict(form), indent=2) + "\n")


def load_form(folder: Path) -> Form:
    """What save_form wrote.

    Raises:
        InputError: missing or damaged.
    """
    try:
        values = json.loads((folder / FORM_FILE).read_bytes())
        return Form(**{**values, "classes": tuple(values["classes"]), "size": tuple(values["size"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / FORM_FILE} is missing or damaged: {error}; it says what the inputs are") from None
