"""What inference makes of weights: made once, and kept for as long as the weights stay as they are.

Rounding the weights of linear layers to bf16, and computing CEMA's coefficients, would otherwise cost each short piece
as much as the piece itself.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# By the identity of the first weight: a reference to it, and {(make, arguments): (marks, others, what was made)}.
# Tensors compare by element, and PyTorch's own dictionary for them takes four times as long to ask.
_kept: dict[int, tuple[Any, dict[Any, Any]]] = {}


def derived(make: Callable[..., T], *weights: Tensor, arguments: tuple[Any, ...] = ()) -> T:
    """make(*weights, *arguments), kept until one of the weights changes; made anew each time while gradients are on.

    A change is another tensor, other memory, or a higher count of writes. PyTorch counts all writes but those through
    `.data` or a NumPy view, and those of fused optimisers: call `forget` after such a one. What has a gradient may be
    about to change so, and nothing of it is kept.

    Args:
        make: pure, a function of a module, so that it is the same at each call.
        weights: at least one. What is kept goes with the first of them.
        arguments: hashable.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not all(map(_steady, weights)):
        return make(*weights, *arguments)
    marks = [(w._version, w.data_ptr(), w.dtype) for w in weights]
    entries = _entries(weights[0])
    entry = entries.get((make, arguments))
    if entry is not None and entry[0] == marks and all(map(_is, entry[1], weights[1:])):
        return entry[2]
    with torch.inference_mode(False), torch.no_grad():  # what is kept may be used under either
        made = make(*(w.detach() for w in weights), *arguments)
    entries[make, arguments] = (marks, [weakref.ref(w) for w in weights[1:]], made)
    return made


def _entries(weight: Tensor) -> dict[Any, Any]:
    """What is kept of a weight; it goes when the weight does."""
    key = id(weight)
    found = _kept.get(key)
    if found is not None and found[0]() is weight:
        return found[1]

    def drop(reference: Any, kept: Any = _kept) -> None:  # at the end of a process the module's names are gone
        found = kept.get(key)
        if found is not None and found[0] is reference:
            del kept[key]

    entries: dict[Any, Any] = {}
    _kept[key] = weakref.ref(weight, drop), entries
    return entries


def _steady(weight: Tensor) -> bool:
    """Whether PyTorch counts the writes to it, and no optimiser is about to make one."""
    return not weight.is_inference() and (not weight.is_leaf or weight.grad is None)


def _is(reference: "weakref.ref[Tensor]", weight: Tensor) -> bool:
    return reference() is weight


def forget(weights: Iterable[Tensor]) -> None:
    """Let go of what is kept of these."""
    for weight in weights:
        _kept.pop(id(weight), None)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in another type, by `derived`; itself if it has that type already."""
    return weight if weight.dtype == dtype else derived(Tensor.to, weight, arguments=(dtype,))
