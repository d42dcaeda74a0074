"""Recipes: everything that defines a training run, as one TOML file."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import tomli_w

from ..architectures import config_of, is_complete
from ..config import ModelConfig
from ..errors import InputError, nearest
from ..model.language_model import Config
from ..parallel.mesh import MeshSizes
from ..tables import parse_value, read_table
from .precision import Precision
from .trained import load_config

TABLES = ("model", "data", "training", "mesh")
"""Of a recipe."""
_BUNDLED = Path(__file__).parent.parent / "recipes"
_MOST = 1 << 53  # of every whole number: beyond it neither JSON nor a float is exact
_MOST_ROWS = 1 << 20  # of what is held as a list
_INSIDE = {str: ("strings", (str,)), float: ("numbers", (int, float)), int: ("whole numbers", (int,))}
ORDERS = ("stream", "shuffled")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
BAD_STEPS = ("stop", "skip", "rewind")


def bundled_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(p.stem for p in _BUNDLED.glob("*.toml"))


def read_recipe(path: str | Path, changes: Iterable[str] = (), tables: Collection[str] = TABLES) -> dict[str, Any]:
    """The tables of a TOML file, or of a recipe of the package by its name.

    Args:
        path: or name.
        changes: of single values, such as training.steps=2000, the value as in TOML; a bare word is a string.
        tables: whose values may be changed.

    Raises:
        InputError: missing or malformed file, or a change that is none.
    """
    if str(path) in bundled_recipes():
        path = _BUNDLED / f"{path}.toml"
    known = f"; recipes of the package: {', '.join(bundled_recipes())}"
    values = read_table(path, "TOML", "the recipe", known)
    for change in changes:
        _change(values, change, tables)
    return values


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
    section: int = 0
    """Tokens after which a longer document is left for another one, so that a short run sees them all; 0 for never."""
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
    """Tokens a row reads in a step, and through which gradients flow."""
    segment: int = 0
    """Tokens of them in memory at a time, with the same gradients, each segment being read twice; 0 for all at once."""
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
    optimizer: str = "adamw"
    """adamw, or muon: Muon for the linear layers inside the blocks, AdamW for everything else."""
    learning_rate: float = 2e-3
    """At the peak."""
    matrix_learning_rate: float = 0.02
    """At the peak, of what Muon moves."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    schedule: str = "cosine"
    """After the warm-up: cosine, linear, constant, or wsd: constant, then linear in the last part of the run."""
    final_learning_rate: float = 0.02
    """At the end of the run, as a fraction of the peak; not for constant."""
    decay_part: float = 0.2
    """Of wsd: the last part of the run, in which the rate falls."""
    weight_decay: float = 0.1
    """Decoupled, on every weight but those that a layer spares."""
    decay_cema: bool = True
    """Also on alpha, delta and theta of CEMA, as in the authors' released code; their research code spares them."""
    beta1: float = 0.9
    """Of AdamW."""
    beta2: float = 0.95
    """Of AdamW."""
    clip: float = 1.0
    """Largest gradient norm; inf for no limit."""
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
    """Minutes between checkpoints; inf for none by time."""
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

    tables: ClassVar[tuple[str, ...]] = TABLES
    """Of a file of it."""
    model: Config
    data: DataRecipe = field(default_factory=DataRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    mesh: MeshSizes = field(default_factory=MeshSizes)

    @classmethod
    def from_dict(cls, values: dict[str, Any], begun: "Recipe | None" = None) -> Self:
        """From plain values; an unknown key is refused with the nearest known one.

        The table [model] may name a size, `size = "small"`, and change single choices of it; or ask for an architecture
        and a number of parameters, see architectures.config_of.

        Args:
            values: by table and key.
            begun: the recipe of the run that is to go on: what a fine-tuning leaves out is then taken from it, and the
                folder it began from is no longer needed.
        """
        if "compare" in values:
            raise InputError("this recipe compares several models; megalodon compare takes it")
        check_keys("recipe", values, TABLES)
        data = fill(DataRecipe, "data", table_of(values, "data"))
        training = fill(TrainingRecipe, "training", table_of(values, "training"))
        model = dict(table_of(values, "model"))
        size = model.pop("size", None)
        _rule(isinstance(size, str | None), "model.size", size, "must be the name of a size")
        if training.begin_from and size is None and not is_complete(model):
            base = begun.model if begun else load_config(Path(training.begin_from))
            if model.get("architecture", base.architecture) == base.architecture:  # load_base refuses another one
                model = base.to_dict() | model
        if training.begin_from and "tokenizer" not in table_of(values, "data"):
            data.tokenizer = training.begin_from
        config = config_of(model) if size is None else ModelConfig.named(size, **model)
        recipe = cls(config, data, training, fill(MeshSizes, "mesh", table_of(values, "mesh")))
        recipe.check()
        return recipe

    @classmethod
    def load(cls, path: str | Path, changes: Iterable[str] = (), begun: "Recipe | None" = None) -> Self:
        """Read a TOML file, or a recipe of the package by its name.

        Args:
            path: or name.
            changes: see read_recipe.
            begun: see from_dict.

        Raises:
            InputError: missing or malformed file, unknown key, wrong value.
        """
        values = read_recipe(path, changes, cls.tables)
        try:
            return cls.from_dict(values, begun)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def changed(self, change: str) -> Self:
        """The recipe with one value changed.

        Args:
            change: see read_recipe.

        Raises:
            InputError: unknown key or wrong value.
        """
        values = self._values()
        _change(values, change, self.tables)
        return self.from_dict(values)

    def _values(self) -> dict[str, Any]:
        parts = {name: vars(getattr(self, name)).copy() for name in self.tables if name != "model"}
        return {"model": self.model.to_dict(), **parts}

    def to_toml(self) -> str:
        """The whole recipe, defaults included, as TOML."""
        return tomli_w.dumps(self._values())

    def check(self) -> None:
        """Refuse values that cannot be trained with: every rule but those of ModelConfig.

        Raises:
            InputError: naming the key, the value and the rule.
        """
        d, t = self.data, self.training
        self.mesh.check()
        _rule(d.order in ORDERS, "data.order", d.order, f"must be one of {', '.join(ORDERS)}")
        self.check_values()
        for name in ("shard", "chunk", "tensor"):
            if t.compile and (size := getattr(self.mesh, name)) != 1:
                raise InputError(
                    f"training.compile = true cannot go with mesh.{name} = {size}: blocks that ranks share are not "
                    f"compiled; set compile to false or {name} to 1"
                )
        if d.order == "shuffled" and t.carry_state:
            raise InputError('data.order = "shuffled" has no state to carry; set training.carry_state = false')
        if d.weights:
            same = len(d.weights) == len(d.train)
            _rule(same, "data.weights", d.weights, f"must have one number for each of {d.train}")
            positive = min(d.weights) > 0 and math.isfinite(sum(d.weights))
            _rule(positive, "data.weights", d.weights, "must be positive, and their sum finite")
        some = "must be 0, or at least 2: of a section its first token is not learnt"
        _rule(d.section == 0 or d.section > 1, "data.section", d.section, some)

    def check_values(self) -> None:
        """Those of the rules that do not depend on what is learnt."""
        d, t = self.data, self.training
        self._require(lambda v: v in OPTIMIZERS, f"must be one of {', '.join(OPTIMIZERS)}", "optimizer")
        self._require(lambda v: v in SCHEDULES, f"must be one of {', '.join(SCHEDULES)}", "schedule")
        self._require(lambda v: v in BAD_STEPS, f"must be one of {', '.join(BAD_STEPS)}", "bad_step")
        self._require(
            lambda v: v in get_args(Precision), f"must be one of {', '.join(get_args(Precision))}", "precision"
        )
        for part in (d, t):
            for key, value in vars(part).items():
                name = f"{'data' if part is d else 'training'}.{key}"
                for v in value if isinstance(value, list) else [value]:
                    if isinstance(v, str):
                        _rule("\0" not in v and _is_unicode(v), name, value, "must be text without the character 0")
                    elif isinstance(v, float):
                        unlimited = key in ("clip", "checkpoint_minutes") and v == math.inf
                        _rule(math.isfinite(v) or unlimited, name, value, "must be finite")
                    else:
                        _rule(abs(v) <= _MOST, name, value, f"must be at most {_MOST}")
        self._require(lambda v: v >= 1, "must be at least 1",
                      "length", "batch_size", "steps", "accumulate", "keep_checkpoints")  # fmt: skip
        self._require(lambda v: v <= _MOST_ROWS, f"must be at most {_MOST_ROWS}", "batch_size", "accumulate")
        self._require(
            lambda v: v > 0, "must be positive", "learning_rate", "matrix_learning_rate", "clip", "checkpoint_minutes"
        )
        self._require(lambda v: v >= 0, "must not be negative",
                      "minutes", "warmup_steps", "weight_decay", "ramp_steps", "spike", "checkpoint_steps",
                      "validate_steps", "validate_bytes", "seed", "segment")  # fmt: skip
        self._require(lambda v: 0 <= v <= 1, "must be between 0 and 1", "final_learning_rate", "decay_part")
        self._require(lambda v: 0 <= v < 1, "must be at least 0 and below 1", "beta1", "beta2", "average")

    def _require(self, holds: Callable[[Any], bool], rule: str, *keys: str) -> None:
        for key in keys:
            value = getattr(self.training, key)
            _rule(holds(value), f"training.{key}", value, rule)


def _change(values: dict[str, Any], change: str, tables: Collection[str]) -> None:
    """Set one value of a recipe as read from TOML; see Recipe.changed."""
    name, equals, value = change.partition("=")
    part, _, key = name.strip().partition(".")
    if not equals or part not in tables:
        raise InputError(f"{change!r} must be like training.steps=2000: a table, a key and a value")
    values[part] = {**table_of(values, part), key.strip(): parse_value(value, change)}


def table_of(values: dict[str, Any], name: str) -> dict[str, Any]:
    table = values.get(name, {})
    _rule(isinstance(table, dict), name, table, f"must be a table, [{name}]")
    return table


def check_keys(where: str, values: dict[str, Any], known: Collection[str]) -> None:
    """Refuse a key that is not known, with the nearest one that is."""
    for key in values:
        if key not in known:
            hint = nearest(key, known) or f"; known keys: {', '.join(known)}"
            raise InputError(f"unknown key {key!r} in the {where}{hint}")


def fill(kind: Any, name: str, values: dict[str, Any]) -> Any:
    """A recipe part from its table, with every value of the type of its default.

    Args:
        kind: a dataclass whose fields have defaults.
        name: of the table, for messages.
        values: of it.
    """
    values, fields = dict(values), {f.name: f.type for f in dataclasses.fields(kind)}
    defaults = {key: getattr(kind(), key) for key in fields}
    check_keys(f"table [{name}]", values, list(defaults))
    for key, value in values.items():
        default = defaults[key]
        if isinstance(default, float) and type(value) is int:
            _rule(abs(value) <= _MOST, f"{name}.{key}", value, f"must be at most {_MOST}")
            values[key] = float(value)
        else:
            _rule(type(value) is type(default), f"{name}.{key}", value, f"must be of type {type(default).__name__}")
        if isinstance(default, list):
            kinds, inside = _INSIDE[get_args(fields[key])[0]]
            _rule(all(type(v) in inside for v in value), f"{name}.{key}", value, f"must be a list of {kinds}")
    return kind(**values)


def _is_unicode(text: str) -> bool:
    """Whether a string can be written; bytes of a command line that are no UTF-8 cannot."""
    return text == text.encode("utf-8", "replace").decode()


def _rule(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        try:
            shown = repr(value)
        except ValueError:  # more digits than Python is willing to write
            shown = "a number of thousands of digits"
        raise InputError(f"{name} = {shown if len(shown) < 200 else f'{shown[:200]}...'} {rule}")
