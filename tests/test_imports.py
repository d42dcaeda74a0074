"""Guards of the layout: imports only point down, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "megalodon_lm"
ROWS = ["files", "config", "ops", "state", "layers", "model", "data", "training", "generation", "evaluation", "cli"]


def imports(path):
    """Top names inside the package that a file imports, type checking aside."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(n) for b in ast.walk(tree) if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.dump(b.test) for n in ast.walk(b)
    }
    depth = len(path.relative_to(PACKAGE).parts) - 1
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in hidden:
            base = list(path.relative_to(PACKAGE).parts[: depth - node.level + 1])
            target = base + (node.module.split(".") if node.module else [])
            yield from ([target[0]] if target else [alias.name for alias in node.names])


def test_imports_only_point_down():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for target in imports(path):
            if target in ("__version__",):
                continue
            seen += 1
            assert ROWS.index(target) <= ROWS.index(own), f"{path} imports {target}, which stands above {own}"
    assert seen > 50


def test_importing_the_package_is_light():
    code = "import sys, megalodon_lm; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "numba", "matplotlib", "tyro"} & set(loaded)


def test_files_hold_one_concept():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path
