"""What inference makes of weights: made once, and kept for as long as the weights stay as they are.

Rounding the weights of linear layers to bf16, and computing CEMA's coefficients, would otherwise cost each short piece
as much as the piece itself.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_SAMPLE = 16  # elements of each weight, from everywhere in it
_NUMBERS: dict[int, Any] = {1: "B", 2: "H", 4: "I", 8: "Q"}  # by bytes of an element

# By the identity of the first weight: a reference to it, and {(make, arguments): (marks, others, samples, what was
# made)}.
# Tensors compare by element, and PyTorch's own dictionary for them takes four times as long to ask.
_kept: dict[int, tuple[Any, dict[Any, Any]]] = {}


def derived(make: Callable[..., T], *weights: Tensor, arguments: tuple[Any, ...] = ()) -> T:
    """make(*weights, *arguments), kept until one of the weights changes; made anew each time while gradients are on.

    A change is another tensor, other memory, or a higher count of writes. PyTorch does not count those through `.data`,
    as adapters make when they are merged, or a NumPy view, nor those of fused optimisers. What has a gradient may be
    about to change so, and nothing of it is kept; else a sample of the elements shows such a write to most of them on
    the CPU. Call `forget` after one to a few, or on another device.

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
    if entry is not None and entry[0] == marks and all(map(_is, entry[1], weights[1:])) and all(map(_holds, entry[2])):
        return entry[3]
    samples = [(memory, memory.tobytes()) for memory in map(_sampled, weights) if memory is not None]
    with torch.inference_mode(False), torch.no_grad():  # what is kept may be used under either
        made = make(*(w.detach() for w in weights), *arguments)
    entries[make, arguments] = (marks, [weakref.ref(w) for w in weights[1:]], samples, made)
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


def _sampled(weight: Tensor) -> memoryview | None:
    """Some elements, as they are whenever one looks, for as long as the weight has the memory that it has now."""
    size, count, place = weight.element_size(), weight.numel(), weight.data_ptr()
    if weight.device.type != "cpu" or not (count and place) or not weight.is_contiguous() or size not in _NUMBERS:
        return None
    memory = (ctypes.c_ubyte * (count * size)).from_address(place)
    return memoryview(memory).cast("B").cast(_NUMBERS[size])[:: count // _SAMPLE | 1]  # odd: of several columns


def _holds(sample: tuple[memoryview, bytes]) -> bool:
    memory, held = sample
    return memory.tobytes() == held


def _is(reference: "weakref.ref[Tensor]", weight: Tensor) -> bool:
    return reference() is weight


def forget(weights: Iterable[Tensor]) -> None:
    """Let go of what is kept of these."""
    for weight in weights:
        _kept.pop(id(weight), None)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in another type, by `derived`; itself if it has that type already."""
    return weight if weight.dtype == dtype else derived(Tensor.to, weight, arguments=(dtype,))
