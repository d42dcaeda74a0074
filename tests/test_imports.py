"""Guards of the layout: imports only point down, and importing the package is cheap."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import megalodon_lm

PACKAGE = Path(__file__).parent.parent / "src" / "megalodon_lm"
ROWS = [
    "errors", "files", "interrupts", "processors", "tables", "plots", "pairs", "sizing", "configuration", "config",
    "ops", "state_spec", "state_file", "state", "layers", "model", "parallel", "baselines", "architectures", "data",
    "training", "planning", "generation", "evaluation", "benchmark", "hub", "serving", "cli", "__main__",
]  # fmt: skip


def checking(node):
    """Whether a statement holds code for the type checker only."""
    return isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"


def imports(source, folder):
    """Names inside the package that a source imports, anywhere in it, type checking aside, without the package's own.

    Args:
        source: Python.
        folder: of the file inside the package, as a tuple of names.
    """
    tree = ast.parse(source)
    hidden = {id(n) for block in ast.walk(tree) if checking(block) for part in block.body for n in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in hidden or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif node.level:
            base = ".".join(("megalodon_lm", *folder[: len(folder) - node.level + 1], *filter(None, [node.module])))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.removeprefix("megalodon_lm.") for name in names if name.startswith("megalodon_lm."))


def test_imports_only_point_down():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        own = parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in ROWS, f"{own} has no place in the layout yet: add it to ROWS and to docs/architecture.md"
        for name in imports(path.read_text(encoding="utf-8"), parts[:-1]):
            target = name.split(".")[0]
            if target != "__version__":
                seen += 1
                assert ROWS.index(target) <= ROWS.index(own), f"{path} imports {target}, which stands above {own}"
    assert seen > 50


def test_no_two_files_need_each_other():
    modules = {p.relative_to(PACKAGE).with_suffix(""): p for p in PACKAGE.rglob("*.py")}
    files = {".".join(m.parts).removesuffix(".__init__"): p for m, p in modules.items()}
    needs = {}
    for own, path in files.items():
        names = imports(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).parts[:-1])
        found = {next((n for n in (name, name.rpartition(".")[0]) if n in files), None) for name in names}
        needs[own] = found - {None, own}
    assert sum(map(len, needs.values())) > 300
    TopologicalSorter(needs).prepare()  # CycleError names the files


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from ..model import decoder", ["model.decoder"]),
        ("from .. import state, config", ["state", "config"]),
        ("from . import cema", ["ops.cema"]),
        ("def f():\n    from megalodon_lm.cli.main import main", ["cli.main.main"]),
        ("import megalodon_lm.training.trainer as t", ["training.trainer"]),
        ("from megalodon_lm import data", ["data"]),
        ("import torch", []),
        ("if TYPE_CHECKING:\n    from ..model import decoder\nelse:\n    from .. import state", ["state"]),
    ],
)
def test_the_guard_sees_every_form_of_import(source, found):
    assert list(imports(source, ("ops",))) == found


HEAVY = {"transformers", "datasets", "numba", "matplotlib", "tyro"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import megalodon_lm", HEAVY | {"torch"}),
        ("from megalodon_lm import ModelConfig", HEAVY | {"torch"}),
        ("from megalodon_lm import Megalodon, State", HEAVY),
        ("from megalodon_lm import *; import torch; Megalodon(ModelConfig.named('tiny'))", {"torch._dynamo", "sympy"}),
        (
            "from megalodon_lm import *; import torch; torch.set_default_device('meta'); "
            "Megalodon(ModelConfig.named('tiny'))",
            {"torch._dynamo", "sympy"},
        ),
    ],
)
def test_importing_the_package_is_light(code, absent):
    code = f"import sys; {code}; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not absent & set(loaded)


def test_public_names_exist():
    assert all(getattr(megalodon_lm, name) is not None for name in megalodon_lm.__all__)
    assert set(megalodon_lm.__all__) <= set(dir(megalodon_lm))
    with pytest.raises(AttributeError, match="no attribute 'Mega'"):
        _ = megalodon_lm.Mega


def test_files_hold_one_concept():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path
