"""Recipes: everything that defines a training run, as one TOML file."""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import InputError
from .precision import Precision

_BUNDLED = Path(__file__).parent.parent / "recipes"


def bundled_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(p.stem for p in _BUNDLED.glob("*.toml"))


@dataclass
class DataRecipe:
    """The text."""

    train: list[str] = field(default_factory=lambda: ["bundled:train"])
    """Training documents: prepared folders, text files, folders of .txt files, or bundled:train."""
    weights: list[float] = field(default_factory=list)
    """How much to take of each of them, relative to each other; nothing for all by their lengths."""
    tokenizer: str = "bytes"
    """bytes; a tokenizer.json; a SentencePiece model; or bpe:4096, say, trained on the text when the run begins."""
    order: str = "stream"
    """stream: rows read documents in order from step to step; shuffled: windows of `length` tokens in random order."""
    validation: list[str] = field(default_factory=lambda: ["bundled:validation"])
    """Validation texts: files, folders of .txt files, bundled:validation, or one prepared folder."""
    prompt: str = ""
    """Beginning of the samples written at each validation; empty for none."""


@dataclass
class TrainingRecipe:
    """The optimisation."""

    begin_from: str = ""
    """Model folder whose weights the run begins with, to train it further; empty for random ones. What [model] leaves
    out, and the tokenizer if none is named, are then taken from it."""
    length: int = 1024
    """Tokens a row reads in a step."""
    batch_size: int = 2
    """Rows."""
    carry_state: bool = True
    """Continue each row's document from the state of the step before (truncated back-propagation through time)."""
    steps: int = 1000
    """Steps of the whole run."""
    minutes: float = 0.0
    """End after this many minutes of training instead of `steps`, with the schedule stretched to fit; 0 for steps."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    ramp_steps: int = 0
    """Steps over which that number grows from 1 to `accumulate`."""
    learning_rate: float = 2e-3
    """At the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    schedule: str = "cosine"
    """After the warm-up: cosine, linear, constant, or wsd: constant, then linear in the last part of the run."""
    final_learning_rate: float = 0.02
    """At the end of the run, as a fraction of the peak; not for constant."""
    decay_part: float = 0.2
    """Of wsd: the last part of the run, in which the rate falls."""
    weight_decay: float = 0.1
    """Decoupled, on every weight."""
    decay_cema: bool = True
    """Also on alpha, delta and theta of CEMA, as in the authors' released code; their research code spares them."""
    beta1: float = 0.9
    """Of AdamW."""
    beta2: float = 0.95
    """Of AdamW."""
    clip: float = 1.0
    """Largest gradient norm."""
    precision: Precision = "auto"
    """bf16 or float32 matrix products; auto takes bf16 where the processor has it."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory."""
    compile: bool = False
    """Compile each block with torch.compile: some 6 % faster after half a minute; the CPU needs a C++ compiler."""
    average: float = 0.0
    """Keep an exponential moving average of the weights with this decay and export it; 0 for none."""
    bad_step: str = "stop"
    """What to do when the loss is not finite or spikes: stop, skip the batch, or go back to the last checkpoint."""
    spike: float = 0.0
    """Nats above its running mean from which a loss is a spike; 0 for no such limit."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    checkpoint_steps: int = 0
    """Steps between checkpoints; 0 for minutes alone."""
    keep_checkpoints: int = 2
    """The newest ones that are kept, besides the best."""
    validate_steps: int = 0
    """Steps between measurements on the validation text; 0 for none."""
    validate_bytes: int = 200_000
    """Bytes of the validation text to measure on; 0 for all."""
    seed: int = 0
    """Of the initial weights, the order of documents and dropout."""


@dataclass
class Recipe:
    """A training run."""

    model: ModelConfig
    data: DataRecipe = field(default_factory=DataRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """From plain values; an unknown key is refused with the nearest known one.

        The table [model] may name a size, `size = "small"`, and change single choices of it.
        """
        _known("recipe", values, ["model", "data", "training"])
        data = _fill(DataRecipe, "data", _table(values, "data"))
        training = _fill(TrainingRecipe, "training", _table(values, "training"))
        model = dict(_table(values, "model"))
        size = model.pop("size", None)
        if training.begin_from and size is None and len(model) < len(dataclasses.fields(ModelConfig)):
            model = ModelConfig.load(Path(training.begin_from) / "config.json").to_dict() | model
        if training.begin_from and "tokenizer" not in _table(values, "data"):
            data.tokenizer = training.begin_from
        config = ModelConfig.from_dict(model) if size is None else ModelConfig.named(size, **model)
        recipe = cls(config, data, training)
        recipe.check()
        return recipe

    @classmethod
    def load(cls, path: str | Path, changes: Iterable[str] = ()) -> "Recipe":
        """Read a TOML file, or a recipe of the package by its name.

        Args:
            path: or name.
            changes: see changed.

        Raises:
            InputError: missing or malformed file, unknown key, wrong value.
        """
        if str(path) in bundled_recipes():
            path = _BUNDLED / f"{path}.toml"
        try:
            with open(path, "rb") as file:
                values = tomllib.load(file)
        except OSError as error:
            raise InputError(
                f"cannot read the recipe {path}: {error.strerror}; "
                f"recipes of the package: {', '.join(bundled_recipes())}"
            ) from None
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"the recipe {path} is not valid TOML: {error}") from None
        for change in changes:
            _change(values, change)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None

    def changed(self, change: str) -> "Recipe":
        """The recipe with one value changed.

        Args:
            change: such as training.steps=2000, the value as in TOML; a bare word is a string.

        Raises:
            InputError: unknown key or wrong value.
        """
        values = {"model": self.model.to_dict(), "data": vars(self.data).copy(), "training": vars(self.training).copy()}
        _change(values, change)
        return Recipe.from_dict(values)

    def to_toml(self) -> str:
        """The whole recipe, defaults included, as TOML."""
        lines = []
        for name, part in (("model", self.model), ("data", self.data), ("training", self.training)):
            lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in dataclasses.asdict(part).items()), ""]
        return "\n".join(lines)

    def check(self) -> None:
        """Refuse values that cannot be trained with.

        Raises:
            InputError: naming the key, the value and the rule.
        """
        t = self.training
        if self.data.order == "shuffled" and t.carry_state:
            raise InputError('data.order = "shuffled" has no state to carry; set training.carry_state = false')
        if self.data.weights and len(self.data.weights) != len(self.data.train):
            raise InputError(f"data.weights = {self.data.weights} must have one number for each of {self.data.train}")
        for key in ("length", "batch_size", "steps", "accumulate", "keep_checkpoints"):
            _rule(getattr(t, key) >= 1, key, getattr(t, key), "must be at least 1")
        for key in ("learning_rate", "clip", "checkpoint_minutes"):
            _rule(getattr(t, key) > 0, key, getattr(t, key), "must be positive")
        for key in (
            "minutes", "warmup_steps", "weight_decay", "ramp_steps", "spike", "checkpoint_steps", "validate_steps",
            "validate_bytes",
        ):  # fmt: skip
            _rule(getattr(t, key) >= 0, key, getattr(t, key), "must not be negative")
        for key in ("beta1", "beta2", "final_learning_rate", "decay_part", "average"):
            _rule(0 <= getattr(t, key) <= 1, key, getattr(t, key), "must be between 0 and 1")


def _change(values: dict[str, Any], change: str) -> None:
    """Set one value of a recipe as read from TOML; see Recipe.changed."""
    name, equals, value = change.partition("=")
    part, _, key = name.strip().partition(".")
    if not equals or part not in ("model", "data", "training"):
        raise InputError(f"{change!r} must be like training.steps=2000: a table, a key and a value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    values.setdefault(part, {})[key] = parsed


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    table = values.get(name, {})
    if not isinstance(table, dict):
        raise InputError(f"{name} must be a table, [{name}], not {table!r}")
    return table


def _known(where: str, values: dict[str, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.4)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise InputError(f"unknown key {key!r} in the {where}{hint}")


def _fill(kind: Any, name: str, values: dict[str, Any]) -> Any:
    """A recipe part from its table, with every value of the type of its default."""
    defaults = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
    _known(f"table [{name}]", values, list(defaults))
    choices = {
        "precision": ("auto", "bf16", "float32"),
        "order": ("stream", "shuffled"),
        "schedule": ("cosine", "linear", "constant", "wsd"),
        "bad_step": ("stop", "skip", "rewind"),
    }
    for key, value in values.items():
        default = defaults[key]
        if isinstance(default, float) and type(value) is int:
            values[key] = float(value)
        elif type(value) is not type(default):
            raise InputError(f"{name}.{key} = {value!r} must be of type {type(default).__name__}")
        if key in choices:
            _rule(value in choices[key], key, value, f"must be one of {', '.join(choices[key])}")
        if isinstance(default, list):
            inside: Any = (int, float) if key == "weights" else str
            if not all(isinstance(v, inside) for v in value):
                kinds = "numbers" if key == "weights" else "strings"
                raise InputError(f"{name}.{key} = {value!r} must be a list of {kinds}")
    return kind(**values)


def _rule(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise InputError(f"training.{key} = {value!r} {rule}")
