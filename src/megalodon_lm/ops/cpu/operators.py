"""When kernels run as an operator, known to autograd and the compiler, and when as a cheaper plain function."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable)


def tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is made of one of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def form(operator: F, function: F, *inputs: Tensor | None) -> F:
    """The operator where what is made of these inputs is recorded, else the function it is made of."""
    return operator if torch.compiler.is_compiling() or tracked(*inputs) else function
