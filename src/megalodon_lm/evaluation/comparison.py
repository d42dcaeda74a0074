"""A comparison: several models that learn from the same tokens in the same order, each at the rate that suits it.

It is a recipe of one run with a table more, [compare]: whom to compare, at which learning rates, with how many seeds,
and what to measure them on. This file says which runs that makes; see docs/comparison.md.
"""

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w

from ..architectures import config_of
from ..errors import InputError, nearest
from ..training.recipe import TABLES, Recipe, check_keys, fill, read_recipe

TOLERANCE = 0.01
"""Part of the base's parameters by which a contender may differ where they are to be equal."""
TUNING_WARMUP = 4
"""A run that chooses a rate warms up in at most one of so many parts of its steps."""
SHARED = ("length", "batch_size", "accumulate", "ramp_steps", "steps", "minutes", "seed", "validate_steps",
          "validate_bytes", "begin_from")  # fmt: skip
"""Keys of [training] that no contender changes: all learn from the same tokens in the same order."""
SIZES = ("parameters", "vocab_size")
"""Keys of [model] that a contender of another architecture takes over."""
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


@dataclass
class CompareRecipe:
    """The table [compare]."""

    base: str = "megalodon"
    """The contender that all are measured against."""
    contenders: dict[str, Any] = field(default_factory=dict)
    """By name, what is other about each; see Contender."""
    rates: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """Factors on the learning rates that are tried, of matrices too; of one alone, nothing is tried."""
    most_rates: int = 6
    """How far the grid is extended where its best rate is at its edge: to so many rates."""
    tuning_steps: int = 200
    """Of each run that tries a rate."""
    full_rates: int = 1
    """Rates that are tried with all steps and the first seed: the best of the shorter runs and, as long as it is
    better, half of it, since longer runs want lower rates."""
    seeds: int = 1
    """Runs of each contender; the first has seed 0."""
    equal_parameters: bool = True
    """Whether contenders must have the parameters of the base, to 1 %."""
    documents: list[str] = field(default_factory=lambda: ["bundled:validation"])
    """What all are measured on afterwards: files and folders, or bundled:validation."""
    document_bytes: int = 0
    """As many bytes of them, from the beginning; 0 for all."""
    contexts: list[int] = field(default_factory=lambda: [256, 1024, 4096, 16_384, 65_536, 0])
    """Tokens after which the state is emptied then; 0 for never."""


@dataclass
class Contender:
    """One of those compared."""

    model: dict[str, Any] = field(default_factory=dict)
    """Changes of [model]. With an architecture, only the wanted size is taken from there."""
    training: dict[str, Any] = field(default_factory=dict)
    """Changes of [training] but for SHARED."""
    readings: dict[str, Any] = field(default_factory=dict)
    """By name, changes of the configuration with which the trained weights of the first seed are measured once more."""
    rates: list[float] = field(default_factory=list)
    """Its own, instead of those of [compare]."""
    seeds: int = 1
    """Its own number, instead of that of [compare]."""
    equal_parameters: bool = True
    """False for an ablation: what is taken away is not given back elsewhere, and the parameters are reported."""


@dataclass(frozen=True)
class Run:
    """One training of a comparison."""

    contender: str
    """Its name."""
    rate: float
    """Factor on the learning rates of its recipe."""
    seed: int
    """Of weights and order of the text."""
    tuning: bool
    """Whether it only tries the rate."""
    recipe: Recipe
    """All there is to it."""

    @property
    def folder(self) -> Path:
        """Within that of the comparison."""
        kind = f"tuning-{self.rate:g}" if self.tuning else f"rate-{self.rate:g}-seed-{self.seed}"
        return Path(self.contender) / kind

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.contender}, rate {self.rate:g}, " + ("tuning" if self.tuning else f"seed {self.seed}")


@dataclass(frozen=True)
class Comparison:
    """What is compared with what.

    Raises:
        InputError: settings that cannot be compared.
    """

    values: Mapping[str, Any]
    """The tables [model], [data], [training] and [compare], as read."""

    def __post_init__(self) -> None:
        check_keys("recipe", dict(self.values), (*TABLES, "compare"))
        s = self.settings
        _require(bool(s.contenders), "contenders", "must name at least one")
        _require(s.base in s.contenders, "base", f"must be one of {', '.join(s.contenders)}")
        _require(s.tuning_steps >= 1, "tuning_steps", "must be at least 1")
        _require(s.full_rates >= 1, "full_rates", "must be at least 1")
        _require(s.document_bytes >= 0, "document_bytes", "must not be negative")
        _require(min(s.contexts, default=-1) >= 0, "contexts", "must be lengths in tokens, or 0 for never")
        for name, contender in self.contenders.items():
            where = f"contenders.{name}"
            _require(bool(_NAME.fullmatch(name)), where, "must be a name of letters, digits, . + - and _")
            positive = bool(contender.rates) and all(0 < rate < math.inf for rate in contender.rates)
            _require(positive, f"{where}.rates", "must be positive numbers")
            _require(contender.seeds >= 1, f"{where}.seeds", "must be at least 1")
            for key in contender.training:
                _require(key not in SHARED, f"{where}.training.{key}", "must be the same for all; set it in [training]")
            for reading, changes in contender.readings.items():
                _require(isinstance(changes, dict), f"{where}.readings.{reading}", "must be a table of changes")
        for name in self.contenders:
            self._check(name)

    def _check(self, name: str) -> None:
        """Refuse a contender that cannot be trained or compared."""
        recipe = self.full(name, 1.0, 0).recipe
        t = recipe.training
        if t.minutes or not t.validate_steps or t.steps % t.validate_steps:
            raise InputError(
                f"training.steps = {t.steps} must be a multiple of training.validate_steps = {t.validate_steps}, with "
                "training.minutes = 0: all learn from the same tokens, and the last validation is at their end"
            )
        wanted, found = self.full(self.settings.base, 1.0, 0).recipe.model.num_parameters, recipe.model.num_parameters
        if self.contenders[name].equal_parameters and abs(found - wanted) > TOLERANCE * wanted:
            raise InputError(
                f"{name} has {found:,} parameters and {self.settings.base} {wanted:,}, more than 1 % apart; change its "
                "sizes, or say equal_parameters = false"
            )
        for reading, changes in self.contenders[name].readings.items():
            try:
                config_of(recipe.model.to_dict() | changes)
            except InputError as error:
                raise InputError(f"compare.contenders.{name}.readings.{reading}: {error}") from None

    @classmethod
    def load(cls, path: str | Path, changes: Iterable[str] = ()) -> "Comparison":
        """Read a TOML file, or a recipe of the package by its name.

        Args:
            path: or name.
            changes: such as training.steps=2000 or compare.seeds=3.

        Raises:
            InputError: missing or malformed file, unknown key, wrong value.
        """
        values = read_recipe(path, changes, (*TABLES, "compare"))
        try:
            return cls(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_toml(self) -> str:
        """As it was read, changes included."""
        return tomli_w.dumps(self.values)

    @cached_property
    def settings(self) -> CompareRecipe:
        """The table [compare]."""
        found: CompareRecipe = fill(CompareRecipe, "compare", self.values.get("compare", {}))
        return found

    @cached_property
    def contenders(self) -> dict[str, Contender]:
        """All, by name, the base first."""
        s = self.settings
        shared = {"rates": s.rates, "seeds": s.seeds, "equal_parameters": s.equal_parameters}
        names = sorted(s.contenders, key=lambda name: name != s.base)
        return {n: fill(Contender, f"compare.contenders.{n}", shared | _table(n, s.contenders[n])) for n in names}

    def choose(self, names: Iterable[str]) -> list[str]:
        """The contenders so named, or all.

        Raises:
            InputError: an unknown name.
        """
        names = list(names)
        for name in names:
            if name not in self.contenders:
                known = ", ".join(self.contenders)
                raise InputError(f"no contender {name!r}{nearest(name, self.contenders)}; contenders: {known}")
        return [name for name in self.contenders if name in names or not names]

    def of(self, names: Iterable[str]) -> "Comparison":
        """The comparison of the contenders so named with the base; of none, this one.

        Raises:
            InputError: an unknown name.
        """
        kept = {self.settings.base, *self.choose(names)}
        values = copy.deepcopy(dict(self.values))
        values["compare"]["contenders"] = {n: c for n, c in self.settings.contenders.items() if n in kept}
        return Comparison(values)

    def full(self, name: str, rate: float, seed: int) -> Run:
        """The run of a contender with a seed, of all steps."""
        return Run(name, rate, seed, False, self._recipe(name, rate, seed=seed))

    def tuning(self, name: str, rate: float) -> Run:
        """The shorter run that tries a rate: the same schedule, squeezed, and one validation at its end."""
        steps = self.settings.tuning_steps
        recipe = self._recipe(name, rate, seed=0, steps=steps, validate_steps=steps)
        recipe.training.warmup_steps = min(recipe.training.warmup_steps, steps // TUNING_WARMUP)
        return Run(name, rate, 0, True, recipe)

    def _recipe(self, name: str, rate: float, **training: Any) -> Recipe:
        contender, values = self.contenders[name], copy.deepcopy(dict(self.values))
        values.pop("compare", None)
        model = values.get("model", {})
        if "architecture" in contender.model:
            model = {key: model[key] for key in SIZES if key in model}
        values["model"] = model | contender.model
        values["training"] = values.get("training", {}) | contender.training | training
        try:
            recipe = Recipe.from_dict(values)
        except InputError as error:
            raise InputError(f"the contender {name}: {error}") from None
        recipe.training.learning_rate *= rate
        recipe.training.matrix_learning_rate *= rate
        return recipe


def next_rate(grid: Iterable[float], tried: Mapping[float, float], most: int) -> float | None:
    """The rate to try next: one of the grid, or the next one beyond its edge where the best of all lies there.

    Args:
        grid: at least one rate; of one alone, nothing is tried.
        tried: what each led to, the lower the better; inf where it diverged.
        most: rates in all, with those beyond the grid.

    Returns:
        It, or None where it is known which is best, or as many as allowed were tried.
    """
    rates = sorted(set(grid))
    if len(rates) == 1:
        return None
    missing = [rate for rate in rates if rate not in tried]
    if missing:
        return missing[0]
    best, rates = best_rate(rates, tried), sorted(tried)
    if len(rates) >= most or best not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbour:.6g}")  # as its folder is called


def next_full_rate(start: float, tried: Mapping[float, float], most: int) -> float | None:
    """The rate to try next with all steps: the first one, then halves of the lowest as long as that is the best.

    Arguments and result as of next_rate.
    """
    if not tried:
        return start
    lowest = min(tried)
    if len(tried) >= most or best_rate((), tried) != lowest:
        return None
    return float(f"{lowest / 2:.6g}")


def best_rate(grid: Iterable[float], tried: Mapping[float, float]) -> float:
    """The rate that led lowest, the lower one of equals; of a grid of one that one."""
    return min(tried or grid, key=lambda rate: (tried.get(rate, math.inf), rate))


def _table(name: str, value: Any) -> dict[str, Any]:
    _require(isinstance(value, dict), f"contenders.{name}", "must be a table of what is other about it")
    return dict(value)


def _require(holds: bool, key: str, rule: str) -> None:
    if not holds:
        raise InputError(f"compare.{key} {rule}")
