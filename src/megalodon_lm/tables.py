"""Tables as TOML and JSON. A user's is read with one line for whatever is wrong; the package's own carry a checksum."""

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from .errors import InputError
from .files import write_atomically

_LARGEST = 1 << 20  # bytes; a file of settings has a few thousand
_BITS = 64  # of integers, as TOML has them


def read_table(path: str | Path, form: Literal["TOML", "JSON"], what: str, remedy: str = "") -> dict[str, Any]:
    """The table that a file holds.

    Args:
        path: of the file.
        form: of its text.
        what: it is, for messages, such as "the recipe".
        remedy: put behind the message about a file that cannot be read.

    Raises:
        InputError: missing or unreadable file, not UTF-8, malformed, or no table.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_LARGEST + 1)
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}{remedy}") from None
    if len(raw) > _LARGEST:
        raise InputError(f"{what} {path} has more than {_LARGEST:,} bytes; it is no file of settings")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not valid {form}: it is not UTF-8 at byte {error.start:,}") from None
    return parse_table(text, form, f"{what} {path}")


def parse_table(text: str, form: Literal["TOML", "JSON"], where: str) -> dict[str, Any]:
    """The table that a text holds.

    Args:
        text: TOML or JSON.
        form: which of them.
        where: it comes from, for messages.

    Raises:
        InputError: malformed, nested too deep, no table, or an integer of more than 64 bits.
    """
    try:
        table = tomllib.loads(text) if form == "TOML" else json.loads(text)
    except RecursionError:
        raise InputError(f"{where} is not valid {form}: it is nested too deep") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{where} is not valid {form}: {error}") from None
    except ValueError:  # thousands of digits
        raise InputError(f"{where} is not valid {form}: a number is too large") from None
    if not isinstance(table, dict):
        raise InputError(f"{where} must hold a table, not {type(table).__name__}")
    if not _integers_fit(table):
        raise InputError(f"{where} is not valid {form}: a number is too large, of more than {_BITS} bits")
    return table


def parse_value(text: str, where: str) -> Any:
    """One value as TOML writes it; a bare word is a string.

    Args:
        text: of the value.
        where: it comes from, for messages.

    Raises:
        InputError: too large a number, or nested too deep.
    """
    try:
        return parse_table(f"value = {text}", "TOML", where)["value"]
    except InputError as error:
        if not isinstance(error.__context__, tomllib.TOMLDecodeError):
            raise
        return text.strip()


def parse_changes(changes: Iterable[str]) -> dict[str, Any]:
    """Values by key, of such as model_dim=128; see parse_value.

    Raises:
        InputError: no key and value, or a value that cannot be.
    """
    found = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"{change!r} must be like model_dim=128: a key and a value")
        found[key.strip()] = parse_value(value, change)
    return found


def _integers_fit(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_integers_fit, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or value.bit_length() < _BITS


def finite_values(value: Any) -> Any:
    """For JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: finite_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_sealed(path: Path, table: dict[str, Any]) -> None:
    """Write JSON with a checksum, atomically.

    Raises:
        InputError: the path cannot be written.
    """
    write_atomically(path, json.dumps({**table, "checksum": _checksum(table)}) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """The table that write_sealed wrote.

    Raises:
        InputError: missing, unreadable, truncated or altered.
    """
    try:
        table = json.loads(path.read_bytes())
        if table.pop("checksum") == _checksum(table):
            return dict(table)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise InputError(f"{path} was truncated or altered, or is of an older version")


def _checksum(table: dict[str, Any]) -> str:
    written = json.loads(json.dumps(table))  # tuples are lists there, and all keys strings
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
