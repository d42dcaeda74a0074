"""What the configurations of all architectures have in common: checked values, TOML and JSON."""

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from .errors import InputError, nearest
from .files import write_atomically
from .tables import read_table

LARGEST = 2**31 - 1  # of every size; whether a machine can hold it is checked where it is allocated


class Configuration(ABC):
    """Base of the frozen dataclasses that describe one model; every field has a default.

    A subclass says the name of its architecture, and checks what else its fields must obey after
    `super().__post_init__()`.

    Raises:
        InputError: a value of another type than its field.
    """

    architecture: ClassVar[str]
    """Its name in the registry, which files carry."""
    model_type: ClassVar[str] = ""
    """Its name in transformers, where that is another."""

    vocab_size: int
    """Tokens in the vocabulary."""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            kind = kinds[field.name]
            check_type(field.name, getattr(self, field.name), kind)
            if kind is float:  # 10000 and 10000.0 are one configuration, with one fingerprint
                object.__setattr__(self, field.name, float(getattr(self, field.name)))

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Trainable scalars, tied weights counted once."""

    @abstractmethod
    def flops_per_token(self, backward: bool = False) -> int:
        """Floating point operations per token, a multiply and an add as two; with `backward` those of training."""

    @classmethod
    @abstractmethod
    def sized(cls, parameters: int, vocab_size: int, **choices: Any) -> Self:
        """The configuration nearest to a number of parameters: within 1 % from 100,000 of them on.

        Raises:
            InputError: a choice that the number of parameters decides.
        """

    @property
    def reading_unit(self) -> int:
        """Tokens after which a piece of reading ends, so that the state there may be kept."""
        return 512

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From plain values, as read from TOML or JSON; an unknown key is refused with the nearest known one.

        A config.json of transformers has keys of its own beside these, and says so by its `model_type`.
        """
        values = dict(values)
        if (named := values.pop("architecture", cls.architecture)) != cls.architecture:
            raise InputError(f"architecture = {named!r} is not that of a {cls.__name__}")
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if values.get("model_type") == (cls.model_type or cls.architecture):
            values = {key: value for key, value in values.items() if key in known}
        for key in values:
            if key not in known:
                raise InputError(f"unknown key {key!r} in the model configuration{nearest(key, known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every key, with the name of the architecture."""
        return {"architecture": self.architecture} | dataclasses.asdict(self)  # type: ignore[call-overload]

    def save(self, path: str | Path) -> None:
        """Write as TOML or JSON, by the ending of the path, atomically."""
        path = Path(path)
        if path.suffix == ".toml":
            lines = [f"{k} = {json.dumps(v)}" for k, v in self.to_dict().items()]
            text = "\n".join(lines)
        else:
            text = json.dumps(self.to_dict(), indent=2)
        write_atomically(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read from TOML or JSON, by the ending of the path.

        Raises:
            InputError: missing or malformed file, unknown key, wrong value.
        """
        values = read_config(path)
        try:
            return cls.from_dict(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def read_config(path: str | Path) -> dict[str, Any]:
    """The plain values in a file of a configuration, TOML or JSON by its ending.

    Raises:
        InputError: missing or malformed file.
    """
    return read_table(path, "TOML" if Path(path).suffix == ".toml" else "JSON", "the model configuration")


def require(holds: bool, field: str, value: Any, rule: str) -> None:
    """Refuse a value that breaks a rule.

    Raises:
        InputError: naming all three.
    """
    if not holds:
        raise InputError(f"{field} = {value!r} {rule}")


def check_type(field: str, value: Any, kind: Any) -> None:
    """Refuse a value that is none of the literals of a field, or not of its type; a whole number may stand for a float.

    Raises:
        InputError: naming the field, the value and what it must be.
    """
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        require(value in choices, field, value, f"must be one of {', '.join(map(repr, choices))}")
    else:
        fits = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
        fits = fits or (kind is float and type(value) is int)
        require(fits, field, value, f"must be of type {kind.__name__}, not {type(value).__name__}")


def check_sizes(config: Configuration, *fields: str) -> None:
    """Refuse sizes below 1 or beyond all machines.

    Raises:
        InputError: naming the first.
    """
    for field in fields:
        value = getattr(config, field)
        require(value >= 1, field, value, "must be at least 1")
        require(value <= LARGEST, field, value, f"must be at most {LARGEST:,}")


def check_positive(config: Configuration, *fields: str) -> None:
    """Refuse numbers that are not above 0 and finite.

    Raises:
        InputError: naming the first.
    """
    for field in fields:
        value = getattr(config, field)
        require(0 < value < math.inf, field, value, "must be positive and finite")


def check_probabilities(config: Configuration, *fields: str) -> None:
    """Refuse parts to drop that are below 0, or all.

    Raises:
        InputError: naming the first.
    """
    for field in fields:
        value = getattr(config, field)
        require(0 <= value < 1, field, value, "is a probability and must be at least 0 and below 1")


def find_size(name: str, sizes: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The values of a named size.

    Raises:
        InputError: unknown name; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in sizes:
        raise InputError(f"unknown size {name!r}{nearest(name, sizes)}; known sizes: {', '.join(sizes)}")
    return sizes[name]
