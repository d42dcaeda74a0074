"""A folder that brings its own code: `trust_remote_code=True` loads it where this package is not installed.

The code is this package's own source, the portable part of it, with nothing changed but where each file imports from:
such a folder is flat. A line of each file says where it comes from.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..files import write_atomically

PACKAGE = Path(__file__).parent.parent


class Family(NamedTuple):
    """Classes that load together.

    Attributes:
        entries: files, and the names that they get, by which transformers asks for them.
        auto_map: what config.json says of the classes.
    """

    entries: dict[str, str]
    auto_map: dict[str, str]


FAMILIES = {
    "megalodon": Family(
        {"hub/configuration.py": "configuration_megalodon", "hub/modeling.py": "modeling_megalodon"},
        {
            "AutoConfig": "configuration_megalodon.MegalodonConfig",
            "AutoModel": "modeling_megalodon.MegalodonModel",
            "AutoModelForCausalLM": "modeling_megalodon.MegalodonForCausalLM",
        },
    ),
    "megalodon_encoder": Family(
        {
            "hub/encoder_configuration.py": "configuration_megalodon_encoder",
            "hub/sequence_classification.py": "modeling_megalodon_encoder",
        },
        {
            "AutoConfig": "configuration_megalodon_encoder.MegalodonEncoderConfig",
            "AutoModelForSequenceClassification": "modeling_megalodon_encoder.MegalodonForSequenceClassification",
        },
    ),
}
_ENTRIES = {path: name for family in FAMILIES.values() for path, name in family.entries.items()}
_KERNELS = ("ops/backend.py", "\nHOMES = {", "\nHOMES: dict[str, Home] = {}  # portable functions alone\n_UNUSED = {")


def write_code(folder: str | Path, family: str = "megalodon") -> None:
    """Put the code beside a model; its configuration must have the `auto_map` of the family.

    Args:
        folder: of the model.
        family: of the model's class.
    """
    sources = _closure([PACKAGE / entry for entry in FAMILIES[family].entries])
    for path in sources:
        write_atomically(Path(folder) / f"{_flat(path)}.py", _rewritten(path, sources))


def _flat(path: Path) -> str:
    """The name of a module in a flat folder."""
    inside = path.relative_to(PACKAGE)
    return _ENTRIES.get(inside.as_posix(), "_".join(inside.with_suffix("").parts))


def _closure(entries: list[Path]) -> list[Path]:
    """Files and all that they import of this package, anywhere in them, in the order of their names."""
    found: set[Path] = set()
    while entries:
        path = entries.pop()
        if path not in found:
            found.add(path)
            entries += [
                module for _, parts in _imports(path, ast.parse(path.read_text("utf-8"))) for module, _ in parts
            ]
    return sorted(found)


def _imports(path: Path, tree: ast.Module) -> Iterator[tuple[ast.ImportFrom, list[tuple[Path, ast.alias | None]]]]:
    """Every relative import of a file, with the files it needs: a module that it names from, or that is the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            if base.with_suffix(".py").is_file():
                yield node, [(base.with_suffix(".py"), None)]
            else:
                yield node, [(base / f"{alias.name}.py", alias) for alias in node.names]


def _rewritten(path: Path, sources: list[Path]) -> str:
    """A file as it stands in a flat folder."""
    text = path.read_text("utf-8")
    lines = text.splitlines(keepends=True)
    for node, parts in sorted(_imports(path, ast.parse(text)), key=lambda found: -found[0].lineno):
        indent = " " * node.col_offset
        names = ", ".join(alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in node.names)
        new = [
            f"{indent}from .{_flat(module)} import {names}\n" if alias is None
            else f"{indent}from . import {_flat(module)} as {alias.asname or alias.name}\n"
            for module, alias in parts
        ]  # fmt: skip
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = new
    text = f"# {path.relative_to(PACKAGE.parent).as_posix()} of megalodon-lm, for a folder without it.\n" + "".join(
        lines
    )
    inside = path.relative_to(PACKAGE).as_posix()
    if inside == _KERNELS[0]:
        assert _KERNELS[1] in text
        text = text.replace(*_KERNELS[1:])
    if _ENTRIES.get(inside, "").startswith("modeling_"):
        text += "\n\ndef _all_files() -> None:  # transformers copies those that it finds named so\n"
        text += "".join(f"    from .{_flat(p)} import __doc__\n" for p in sources if p != path)
    return text
