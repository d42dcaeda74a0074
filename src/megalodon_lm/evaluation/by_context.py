"""The effect of context: one text, read with the state emptied every so many tokens, and never."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..data.tokenizer import Tokenizer
from ..model.language_model import LanguageModel
from ..plots import finite, length_axis, picture
from ..training.precision import Precision
from .norm_statistics import NormSchedule
from .perplexity import Losses, score_texts

WHOLE = 0
"""The context that is never cut."""


@dataclass
class Curve:
    """Losses of the same documents for several lengths of context."""

    norm_statistics: str
    """cumulative or windowed; see norm_statistics.py."""
    num_bytes: int
    losses: dict[int, Losses]
    """By context in tokens, short ones first; the last is the longest."""

    @property
    def bits_per_byte(self) -> dict[int, float]:
        """By context."""
        return {context: losses.bits_per_byte(self.num_bytes) for context, losses in self.losses.items()}

    @property
    def largest_rise(self) -> float:
        """Bits per byte by which a context is worse than the next shorter one, at most; negative if all are better."""
        values = list(self.bits_per_byte.values())
        return max((b - a for a, b in itertools.pairwise(values)), default=0.0)

    @property
    def verdict(self) -> str:
        """What the curve says, in a few words."""
        if not all(map(math.isfinite, self.bits_per_byte.values())):
            return "the losses are not finite"
        if len(self.losses) == 1:
            return f"{self.longest.bits_per_byte(self.num_bytes):.4f} bits per byte"
        said = "every longer context is better" if self.largest_rise < 0 else "longer contexts are worse"
        return f"{said}: the largest change from one to the next is {self.largest_rise:+.4f}"

    @property
    def longest(self) -> Losses:
        """With the longest context."""
        return list(self.losses.values())[-1]

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bits_per_byte_by_context": self.bits_per_byte,
            "perplexity_by_context": {
                context: losses.perplexity if math.isfinite(losses.perplexity) else None
                for context, losses in self.losses.items()
            },
            "bits_per_token_by_position": self.longest.by_position(),
            "largest_rise": self.largest_rise,
        }


def measure(
    model: LanguageModel,
    read: Callable[[], Iterable[Iterable[bytes]]],
    tokenizer: Tokenizer,
    contexts: Sequence[int],
    precision: Precision,
    schedule: NormSchedule | None = None,
    watch: Callable[[int, Losses], None] = lambda context, losses: None,
) -> Curve:
    """Score documents, each by itself, once for each context, in constant memory.

    Args:
        model: in evaluation mode.
        read: begins the documents anew, each in blocks of UTF-8.
        tokenizer: of the model.
        contexts: in tokens; WHOLE, and whatever is longer than the longest document, is a whole document.
        precision: of matrix products.
        schedule: see norm_statistics; None for the statistics the model was trained with.
        watch: called now and then with the context and its losses so far.
    """
    found: dict[int, Losses] = {}
    for context in _ordered(contexts):
        losses = score_texts(model, read(), tokenizer, context or None, precision, schedule, partial(watch, context))
        found[losses.longest] = losses
        if context > losses.longest:
            break
    return Curve("windowed" if schedule else "cumulative", losses.num_bytes, found)


def _ordered(contexts: Sequence[int]) -> Iterator[int]:
    """Short ones first, the whole text last."""
    yield from sorted(set(contexts) - {WHOLE})
    if WHOLE in contexts:
        yield WHOLE


def draw(path: Path, curves: Sequence[Curve]) -> None:
    """Bits per byte by context.

    Raises:
        InputError: the path cannot be written, or its ending names no kind of picture.
    """
    with picture(path, [["context"]]) as axes:
        axis = axes["context"]
        for curve in curves:
            x, y = finite(curve.bits_per_byte.items())
            axis.plot(x, y, "o-", label=f"{curve.norm_statistics} norm statistics")
        length_axis(axis, [context for curve in curves for context in curve.losses])
        axis.set(xlabel="state emptied every so many tokens; the last is the whole text", ylabel="bits per byte")
        axis.set_title(curves[0].verdict)
        axis.legend()
