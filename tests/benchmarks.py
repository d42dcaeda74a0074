"""The files of benchmarks/, which are no package, as modules."""

import importlib.util
import sys
from types import ModuleType

from .processes import ROOT


def benchmark(name: str) -> ModuleType:
    """benchmarks/NAME.py, not run."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
