"""A training pass without numbers: every operator is asked what it would make, and nothing is computed.

So a model of any size is planned in a second, with what its operators really keep. Native operators answer like all
others; scratch memory inside one is not seen. Portable operators look at values and cannot be planned: a GPU without
native kernels needs more.
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..architectures import build
from ..errors import InputError
from ..model.language_model import Config
from ..ops import backend, rotary
from ..ops.cpu import rotary as cpu_rotary
from ..training.precision import autocast

_CPU = torch.device("cpu")
_OF_A_STATE = 16  # FLOPs of CEMA for a token and a state: decay, input and output, complex
_BACKWARD = 3  # times those of CEMA's forward pass: states again, their gradients, those of the coefficients
_ATTENTION_BACKWARD = 2.5  # times those forward: scores again, and four products


@dataclass
class Work:
    """What operators do.

    Attributes:
        products: FLOPs of matrix products outside attention.
        attention: FLOPs of matrix products in it.
        vectors: FLOPs of recurrences.
        moved: bytes that all other operators read and write.
        calls: of operators.
    """

    products: float = 0.0
    attention: float = 0.0
    vectors: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def times(self, count: float) -> "Work":
        """So often."""
        return Work(*(count * value for value in vars(self).values()))


@dataclass
class DryRun:
    """One pass of a model over tokens, forward and backward.

    Attributes:
        kept: bytes that are kept for the backward pass, and of the State at the end.
        kept_by_layer: of them, those of each layer.
        working: most bytes beside them, made for a moment, the gradients of the head among them.
        forward, head, backward: work; that of the head is part of the first.
        averages, norms: of it, that of CEMA and that of norms over time, forward and backward.
        residual: bytes of the residual stream.
    """

    kept: float
    kept_by_layer: float
    working: float
    forward: Work
    head: Work
    backward: Work
    averages: Work
    norms: Work
    residual: float

    def grown(self, two: "DryRun", layers: int) -> "DryRun":
        """From passes of one layer (this) and of two, one of so many."""

        def grow(one: float, both: float) -> float:
            return one + (both - one) * (layers - 1)

        grown: dict[str, Any] = {
            name: Work(*map(grow, vars(a).values(), vars(b).values())) if isinstance(a, Work) else grow(a, b)
            for (name, a), b in zip(vars(self).items(), vars(two).values(), strict=True)
        }
        return DryRun(**{**grown, "kept_by_layer": two.kept - self.kept})


def dry_run(config: Config, rows: int, length: int, precision: Literal["bf16", "float32"]) -> DryRun:
    """A training pass over rows of so many tokens, from an empty state and with a loss at each token.

    Raises:
        InputError: an architecture, or a machine, without native operators for all of it.
    """
    if not backend.runs_natively(torch.zeros(())):  # tries them, which cannot be done without numbers
        raise InputError("plans need the native operators, and they cannot be used here; see megalodon info")
    layers = int(config.to_dict()["num_layers"])
    one, two = (_of(replace(config, num_layers=n), rows, length, precision) for n in (1, 2))  # type: ignore[type-var]
    return one.grown(two, layers)


def _of(config: Config, rows: int, length: int, precision: Literal["bf16", "float32"]) -> DryRun:
    with torch.device("meta"):
        model: Any = build(config).train()
    try:
        with _without_numbers():
            _give_memory(model)
            tokens = torch.zeros(rows, length, dtype=torch.int64)
            with Record(span_of(config, length)) as record:
                with autocast(precision, _CPU):
                    x, *carried = model.body(model.embed(tokens))
                    body = record.total()
                    loss, *norm = model.output(x, targets=tokens)
                    carried += norm  # a State at the end is in memory too
                kept, forward = record.now, record.total()
                residual = x.numel() * x.element_size()
                record.peak = record.now
                loss.backward()
            return DryRun(
                kept, 0, record.peak - kept, forward, forward + body.times(-1), record.total() + forward.times(-1),
                record.total("cema"), record.total("norm_over_time", "decay_norm"), residual,
            )  # fmt: skip
    except (DynamicOutputShapeException, DataDependentOutputException):
        raise InputError(
            f"this {config.architecture} cannot be planned: its operators look at numbers, unlike those of a "
            "Megalodon with chunk attention and no memory"
        ) from None


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Tensors have shapes alone; tables that operators keep for later calls are made anew before and after."""
    tables = (rotary.rotations, cpu_rotary.angle_tables)
    try:
        for table in tables:
            table.cache_clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        for table in tables:
            table.cache_clear()


def _give_memory(model: nn.Module) -> None:
    """Weights on the CPU in place of those without a device; what is tied stays so."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                made.setdefault(id(weight), nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype)))
                module._parameters[name] = made[id(weight)]


class Record(TorchDispatchMode):
    """What operators make and do, while it is on.

    Args:
        span: tokens that one sees in attention, in the mean.

    Attributes:
        now, peak: bytes of tensors made and still there, and their most so far.
        by_operator: work by name.
    """

    def __init__(self, span: float) -> None:
        super().__init__()
        self.span = span
        self.now = self.peak = 0
        self.by_operator: dict[str, Work] = defaultdict(Work)
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        given, taken = _tensors((args, kwargs)), _tensors(made)
        known = {t.untyped_storage()._cdata for t in given}
        for t in taken:
            storage = t.untyped_storage()
            if storage._cdata not in self._sizes and storage._cdata not in known:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        if taken and not op.is_view and "empty" not in str(op):
            self.by_operator[str(op)] += _work(
                op, args, kwargs or {}, made, sum(map(_nbytes, [*given, *taken])), self.span
            )
        return made

    def _free(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)

    def total(self, *names: str) -> Work:
        """Of all operators, or of those with one of these in their names."""
        chosen = [w for op, w in self.by_operator.items() if not names or any(name in op for name in names)]
        return sum(chosen, Work())


def span_of(config: Any, length: int) -> float:
    """Tokens that one sees in attention, in the mean."""
    chunk = min(config.reading_unit, length)
    return (chunk + 1) / 2 + (chunk if getattr(config, "attention", "chunk") == "sliding" and chunk < length else 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _nbytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _work(op: Any, args: Any, kwargs: Any, made: Any, moved: float, span: float) -> Work:
    """Of one call; `span` are the tokens that one sees in attention, in the mean."""
    name = str(op)
    if op.overloadpacket in flop_registry:
        return Work(products=flop_registry[op.overloadpacket](*args, **kwargs, out_val=made), calls=1)
    back = "backward" in name
    if name.startswith("megalodon.attention_"):
        q, v = (args[1], args[3]) if back else (args[0], args[2])
        flops = 2 * math.prod(q.shape[:3]) * span * (q.shape[3] + v.shape[3])
        return Work(attention=flops * (_ATTENTION_BACKWARD if back else 1), calls=1)
    if name.startswith("megalodon.cema_"):
        states = args[7 if back else 3].shape[2]
        return Work(vectors=_OF_A_STATE * args[0].numel() * states * (_BACKWARD if back else 1), calls=1)
    return Work(moved=moved, calls=1)
