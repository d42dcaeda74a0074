"""How well a text that was written agrees with reference texts: F1 of words, exact match, ROUGE.

The rules are those of SCROLLS (Shaham et al. 2022, arXiv 2201.03533), whose F1 and exact match have the normalisation
of SQuAD (Rajpurkar et al. 2016): lower case, no ASCII punctuation, no articles, single spaces. Of several references
the best counts, of ROUGE for each of its kinds by itself. In Qasper "Unanswerable", "Yes" and "No" are references like
any other; whoever says nothing says "Unanswerable". All figures are from 0 to 1.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from ..errors import InputError

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, with single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(said: str, references: Sequence[str]) -> float:
    """1 if it is one of the references, normalised, otherwise 0."""
    return float(normalised(said) in map(normalised, references))


def f1(said: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the normalised words, each counted as often as it stands there."""
    return max(_f1(normalised(said).split(), normalised(reference).split()) for reference in references)


def _f1(said: Sequence[str], reference: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(reference)).values())
    return 2 * common / (len(said) + len(reference)) if common else 0.0


class Rouge(NamedTuple):
    """F-measures of words, of pairs of words, and of the longest common subsequence of words."""

    rouge1: float
    rouge2: float
    rougeL: float


def rouge(said: str, references: Sequence[str]) -> Rouge:
    """Of the words in lower case, not stemmed.

    Raises:
        InputError: the package rouge-score is missing.
    """
    scores = [_scorer().score(reference, said) for reference in references]
    return Rouge(*(max(score[kind].fmeasure for score in scores) for kind in Rouge._fields))


@cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("ROUGE needs the package rouge-score: pip install 'megalodon-lm[eval]'") from None
    return RougeScorer(list(Rouge._fields))


class Mean(NamedTuple):
    """Of questions, with its standard error."""

    value: float
    error: float | None
    """None of one question."""


def mean(values: Sequence[float]) -> Mean:
    """The arithmetic mean; there must be one value."""
    middle = math.fsum(values) / len(values)
    if len(values) == 1:
        return Mean(middle, None)
    variance = math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return Mean(middle, math.sqrt(variance / len(values)))


def geometric_mean(rouges: Sequence[Rouge]) -> Mean:
    """Of the means of the three kinds, the one figure that SCROLLS gives of summaries.

    Its standard error is that of the mean of what each summary adds to it, to first order.
    """
    means = [mean(kind).value for kind in zip(*rouges, strict=True)]
    middle = math.prod(means) ** (1 / len(means))
    if not middle:
        return Mean(0.0, 0.0 if len(rouges) > 1 else None)
    shares = [middle * math.fsum(v / m for v, m in zip(one, means, strict=True)) / len(means) for one in rouges]
    return Mean(middle, mean(shares).error)
