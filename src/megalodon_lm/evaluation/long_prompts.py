"""Long prompts from seeds: what stands somewhere in a document of any length is asked for, in the manner of RULER.

Needles, chains of variables and facts stand among the sentences of real prose; common and frequent words are lists.
The kinds are those of Hsieh et al. 2024 (RULER, arXiv 2404.06654), in wordings of this project, and question answering
of two hops, whose answer takes two facts that stand apart. A document may have several questions, which share its
reading.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase

import numpy as np

from ..errors import InputError
from .recall_prose import HIDDEN, PLACES, THINGS, Prose, spliced

CHOICES = 8
VALUES = 4
"""Of a needle with many, and needles that are asked for at once."""
HOPS = 4
COMMON, FREQUENT = 10, 3
"""Words that are asked for."""
MOST_NEEDLES = 16
_OFTENER = 10  # times that a common word stands oftener than another
_COLOURS = (
    "amber", "black", "blue", "brown", "copper", "crimson", "golden", "green", "grey", "ivory", "orange", "purple",
    "scarlet", "silver", "violet", "white",
)  # fmt: skip
_OWNERS = (
    "baron", "bishop", "captain", "cooper", "doctor", "druid", "duchess", "fiddler", "glazier", "hunter", "jester",
    "merchant", "miller", "painter", "shepherd", "weaver",
)  # fmt: skip


@dataclass(frozen=True)
class LongQuestion:
    """What is asked of a document."""

    text: str
    cue: str
    """Begins the answer."""
    answers: tuple[str, ...]
    """All of which it should contain."""
    choices: tuple[str, ...] = ()
    """For likelihoods: the right one first, then others of the kind; empty where there are none."""
    depth: float | None = None
    """Part of the document before what is asked for; None where that stands all over."""


@dataclass(frozen=True)
class LongDocument:
    """Tokens without the begin token, and what is asked of them."""

    tokens: np.ndarray
    questions: list[LongQuestion]


@dataclass
class Haystack:
    """Prose to hide something in, or words for a list, of so many tokens at most."""

    prose: Prose
    length: int
    random: np.random.Generator

    def hiding(self, needles: Sequence[tuple[float, str]]) -> np.ndarray:
        """A stretch of prose with sentences in it, each before the sentence nearest to its depth.

        Raises:
            InputError: no room for them.
        """
        parts = [self.prose.tokenizer.encode(text) for _, text in needles]
        room = self.length - sum(map(len, parts))
        if room < self.length // 4:
            raise InputError(
                f"{self.length:,} tokens are too few for {len(needles)} sentences to be hidden in; take longer prompts"
            )
        tokens, starts = self.prose.stretch(room, self.random)
        places = np.append(starts, room)
        cuts = np.array([places[np.abs(places - depth * room).argmin()] for depth, _ in needles])
        order = np.argsort(cuts, kind="stable")
        return spliced(tokens, cuts[order], [parts[i] for i in order])

    def draw(self, values: Sequence[str], number: int) -> list[str]:
        """Different ones of some values."""
        return [values[i] for i in self.random.permutation(len(values))[:number]]

    def numbers(self, count: int) -> list[str]:
        """Different numbers of six digits, none of which can stand in prose by accident."""
        return [str(100_000 + n) for n in self.random.choice(900_000, count, replace=False)]

    def keys(self, count: int) -> list[str]:
        """Different things, such as "green violin"."""
        return self.draw([f"{colour} {thing}" for colour in _COLOURS for thing in THINGS], count)

    def fitting(self, words: Sequence[str]) -> np.ndarray:
        """As many of the words, in a row, as there is room for."""
        return self.prose.tokenizer.encode(" ".join(words))[: self.length]


def _needle(key: str, number: str) -> str:
    return f" The secret number of the {key} is {number}."


def _asked_for(key: str, number: str, others: Sequence[str], depth: float) -> LongQuestion:
    choices = tuple(f" {n}" for n in (number, *others[: CHOICES - 1]))
    text, cue = f"What is the secret number of the {key}?", f"The secret number of the {key} is"
    return LongQuestion(text, cue, (number,), choices, depth)


def single(hay: Haystack, depths: Sequence[float]) -> Iterator[LongDocument]:
    """One needle in each document."""
    for depth in depths:
        [key], (number, *others) = hay.keys(1), hay.numbers(CHOICES)
        yield LongDocument(hay.hiding([(depth, _needle(key, number))]), [_asked_for(key, number, others, depth)])


def multi_key(hay: Haystack, depths: Sequence[float]) -> list[LongDocument]:
    """Many needles, each of which is the distractor of the others: one document for all depths."""
    room = hay.length // (8 * len(hay.prose.tokenizer.encode(_needle("crimson summerhouse", "100000"))))
    count = max(len(depths), min(MOST_NEEDLES, room))
    keys, numbers = hay.keys(count), hay.numbers(count + CHOICES)
    places = [*depths, *hay.random.random(count - len(depths))]
    needles = [(place, _needle(key, n)) for place, key, n in zip(places, keys, numbers, strict=False)]
    questions = [
        _asked_for(key, number, [n for n in numbers if n != number], depth)
        for depth, key, number in zip(depths, keys, numbers, strict=False)
    ]
    return [LongDocument(hay.hiding(needles), questions)]


def multi_value(hay: Haystack, depths: Sequence[float]) -> list[LongDocument]:
    """One key with several numbers, all of which are asked for."""
    [key], numbers = hay.keys(1), hay.numbers(VALUES)
    tokens = hay.hiding([(place, _needle(key, n)) for place, n in zip(hay.random.random(VALUES), numbers, strict=True)])
    text, cue = f"What are all {VALUES} secret numbers of the {key}?", f"The secret numbers of the {key} are"
    return [LongDocument(tokens, [LongQuestion(text, cue, tuple(numbers))])]


def multi_query(hay: Haystack, depths: Sequence[float]) -> list[LongDocument]:
    """Several needles, all of which are asked for at once."""
    keys, numbers = hay.keys(VALUES), hay.numbers(VALUES)
    places = hay.random.random(VALUES)
    tokens = hay.hiding([(p, _needle(k, n)) for p, k, n in zip(places, keys, numbers, strict=True)])
    listed = ", the ".join(keys[:-1]) + f" and the {keys[-1]}"
    text, cue = f"What are the secret numbers of the {listed}?", f"The secret numbers of the {listed} are"
    return [LongDocument(tokens, [LongQuestion(text, cue, tuple(numbers))])]


def variables(hay: Haystack, depths: Sequence[float]) -> list[LongDocument]:
    """A chain of variables, each set to the one before, of which the first has a number; and another such chain."""
    letters = np.array(list(ascii_uppercase))
    names = hay.draw(sorted({"".join(letters[hay.random.integers(26, size=5)]) for _ in range(64)}), 2 * (HOPS + 1))
    first, second = hay.numbers(2)
    needles = []
    for chain, number in ((names[: HOPS + 1], first), (names[HOPS + 1 :], second)):
        values = [number, *(f"VAR {name}" for name in chain)]
        places = np.sort(hay.random.random(HOPS + 1))
        needles += [(p, f" VAR {n} = {v}.") for p, n, v in zip(places, chain, values, strict=False)]
    text, cue = f"Which {HOPS + 1} variables have the value {first}?", f"The variables with the value {first} are"
    question = LongQuestion(text, cue, tuple(names[: HOPS + 1]))
    return [LongDocument(hay.hiding(needles), [question])]


def common_words(hay: Haystack, depths: Sequence[float]) -> list[LongDocument]:
    """A list of words of the prose, in which some stand ten times as often as the others."""
    words = hay.draw(hay.prose.words, len(hay.prose.words))
    room = round(hay.length * len(words) / len(hay.prose.tokenizer.encode(" ".join(words))))
    rare = max(COMMON, min(len(words) - COMMON, room - COMMON * _OFTENER))
    times = max(1, room // (rare + COMMON * _OFTENER))
    listed = words[:COMMON] * _OFTENER * times + words[COMMON : COMMON + rare] * times
    listed += words[COMMON : COMMON + min(rare, max(0, room - len(listed)))]  # once more, while there is room
    tokens = _listed(hay, listed)
    text = f"Which {COMMON} words are the most common in the list?"
    return [LongDocument(tokens, [LongQuestion(text, f"The {COMMON} most common words are", tuple(words[:COMMON]))])]


def frequent_words(hay: Haystack, depths: Sequence[float]) -> list[LongDocument]:
    """A list of made-up words, of which the k-th most frequent stands there 1 / k^2 times as often as the first."""
    letters = np.array(list(ascii_lowercase))
    words = sorted({"".join(letters[hay.random.integers(26, size=6)]) for _ in range(64)})
    words = hay.draw(words, len(words))
    room = hay.length * len(words) / len(hay.prose.tokenizer.encode(" ".join(words)))
    shares = 1 / np.arange(1, len(words) + 1) ** 2.0
    times = np.maximum(1, np.floor(0.95 * room * shares / shares.sum())).astype(int)
    kept = int((np.cumsum(times) <= room).sum())
    tokens = _listed(hay, [word for word, n in zip(words[:kept], times, strict=False) for _ in range(n)])
    text, cue = f"Which {FREQUENT} words are the most frequent in the list?", f"The {FREQUENT} most frequent words are"
    return [LongDocument(tokens, [LongQuestion(text, cue, tuple(words[:FREQUENT]))])]


def _listed(hay: Haystack, words: list[str]) -> np.ndarray:
    """In a random order; where there is no room for all, those at the end of the order are left out."""
    return hay.fitting([words[i] for i in hay.random.permutation(len(words))])


def two_hops(hay: Haystack, depths: Sequence[float]) -> list[LongDocument]:
    """Where a thing is hidden, and whose that place is: the owner is asked for; one document for all depths."""
    count = max(len(depths), min(CHOICES, hay.length // 512))
    things, places = hay.draw(THINGS, count), hay.draw(PLACES, count)
    owners = hay.draw(_OWNERS, len(_OWNERS))
    needles = [
        (depth, f"{HIDDEN.statement.format(thing)} {place}.")
        for depth, thing, place in zip([*depths, *hay.random.random(count - len(depths))], things, places, strict=True)
    ]
    spread = hay.random.random(count)
    needles += [(at, f" The {p} belongs to the {o}.") for at, p, o in zip(spread, places, owners, strict=False)]
    questions = []
    for depth, thing, owner in zip(depths, things, owners, strict=False):
        text, cue = f"To whom belongs the place where the {thing} is hidden?", "It belongs to the"
        choices = [f" {owner}", *(f" {other}" for other in owners if other != owner)]
        questions.append(LongQuestion(text, cue, (owner,), tuple(choices[:CHOICES]), depth))
    return [LongDocument(hay.hiding(needles), questions)]


LONG_TASKS: dict[str, Callable[[Haystack, Sequence[float]], Iterable[LongDocument]]] = {
    "needle": single,
    "multi-key": multi_key,
    "multi-value": multi_value,
    "multi-query": multi_query,
    "variables": variables,
    "common-words": common_words,
    "frequent-words": frequent_words,
    "two-hops": two_hops,
}
"""Documents of each kind, for the depths at which something is to be asked for."""
