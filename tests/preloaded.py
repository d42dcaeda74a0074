"""What forks of a process that has imported this need not import themselves; nothing is computed.

Without it every rank and command would import TorchDynamo, which an optimizer needs, and the kernels, and would set up
numba, at its first step: seconds for each.
"""

import importlib
import pkgutil

import torch._dynamo  # noqa: F401
from numba.core.registry import cpu_target

import megalodon_lm.ops
import megalodon_lm.training.trainer

for module in pkgutil.walk_packages(megalodon_lm.ops.__path__, "megalodon_lm.ops."):
    importlib.import_module(module.name)
cpu_target.target_context.refresh()
