"""The text of a run: sequences of documents, and how much is taken from each."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import InputError
from .corpus import Texts
from .sequence import Sequence
from .shards import Prepared, is_prepared
from .tokenizer import Tokenizer


class Mixture:
    """Sequences taken from by weight: always the one that is furthest behind its share.

    Args:
        sequences: at least one.
        weights: one each, positive; None for their lengths.

    Raises:
        InputError: wrong weights.
    """

    def __init__(self, sequences: list[Sequence], weights: list[float] | None = None):
        if weights is None:
            weights = [float(len(s)) for s in sequences]
        if len(weights) != len(sequences) or min(weights) <= 0:
            raise InputError(f"weights {weights} must be {len(sequences)} positive numbers, one for each source")
        self.sequences = sequences
        self.shares = [w / sum(weights) for w in weights]

    @property
    def fingerprint(self) -> str:
        """Of all sequences and their shares."""
        parts = [f"{s.fingerprint}*{share:.9f}" for s, share in zip(self.sequences, self.shares, strict=True)]
        return parts[0].partition("*")[0] if len(parts) == 1 else "+".join(parts)

    def furthest_behind(self, taken: list[int]) -> int:
        """The sequence whose turn it is, given what was taken from each."""
        total = sum(taken) + 1
        return max(range(len(taken)), key=lambda i: self.shares[i] * total - taken[i])


def load_mixture(
    sources: list[str], weights: list[float], tokenizer: Tokenizer, seed: int, section: int = 0
) -> Mixture:
    """The text that a recipe names.

    Args:
        sources: prepared folders, and what Texts takes.
        weights: one for each source; none to take all by their lengths.
        tokenizer: of the model.
        seed: of the order of documents.
        section: see Sequence.

    Raises:
        InputError: missing or unreadable source, or one prepared with another tokenizer.
    """
    groups = [[source] for source in sources] if weights else _together(sources)
    sequences = [_sequence(group, tokenizer, seed, section) for group in groups]
    return Mixture(sequences, weights or None)


def _together(sources: list[str]) -> list[list[str]]:
    """Raw texts as one sequence, and each prepared folder as another."""
    raw = [source for source in sources if not is_prepared(source)]
    return ([raw] if raw or not sources else []) + [[source] for source in sources if is_prepared(source)]


def _sequence(sources: list[str], tokenizer: Tokenizer, seed: int, section: int) -> Sequence:
    if len(sources) == 1 and is_prepared(sources[0]):
        prepared = Prepared.open(Path(sources[0]))
        if prepared.manifest["fingerprint"] != tokenizer.fingerprint:
            raise InputError(
                f"{sources[0]} was prepared with another tokenizer, {prepared.manifest['tokenizer']}; "
                "set data.tokenizer to it"
            )
        ends = [documents["end"] for documents in prepared.documents]
        return Sequence(prepared.tokens, ends, seed, prepared.digest, prepared.answers, section)
    begin = np.array([tokenizer.begin])
    texts = (np.concatenate([begin, *tokenizer.encode_blocks(text.blocks)]) for text in Texts(sources))
    return in_memory(texts, seed, section)


def in_memory(documents: Iterable[np.ndarray], seed: int, section: int = 0) -> Sequence:
    """A sequence of documents, each given as its tokens."""
    arrays = list(documents)
    whole = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
    dtype = np.uint16 if whole.max(initial=0) < 1 << 16 else np.uint32
    return Sequence([whole.astype(dtype)], [np.cumsum([len(a) for a in arrays])], seed, section=section)
