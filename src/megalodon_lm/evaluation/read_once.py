"""Read once, ask many: what several questions have in common is read once, and each of them goes on from a fork of it.

To the last bit it is what reading everything anew gives. A `Context` reads in pieces counted from the beginning of the
text; what a question is asked after is computed to its end by itself, and its answers go on from there. So a figure
depends on the tokens before the answers, on the answers compared with it, and on nothing else: neither on what was
shared nor on which other questions there were. Answers are written several at a time; those of a model without compiled
steps may round by what is written beside them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.tokenizer import Tokenizer
from ..errors import Diverged
from ..generation.context import MAX_PIECE_LENGTH, Context
from ..generation.generator import Generator
from ..generation.sampling import Sampling
from ..model.language_model import LanguageModel
from ..training.precision import Precision, autocast

BLOCK_LOGITS = 1 << 24  # in memory at a time
BLOCK_TOKENS = 1 << 16  # of a long text, so that no copy is made of all of it
ROWS = 8  # answers written side by side
GREEDY = Sampling(temperature=0)


class Score(NamedTuple):
    """How a model takes a continuation."""

    log_likelihood: float
    """Of all its tokens, in nats."""
    greedy: bool
    """Whether each of them is the likeliest of the whole vocabulary."""


@dataclass
class Work:
    """Tokens, counted over all that a Reader did."""

    computed: int = 0
    """Tokens that went through the model."""
    anew: int = 0
    """Those that would have, with everything before each continuation read again for it."""

    @property
    def saving(self) -> float:
        """How many times fewer were computed."""
        return self.anew / max(1, self.computed)


def window_of(model: LanguageModel) -> int | None:
    """Most tokens that a model with a window sees, or None of one without a limit."""
    return getattr(model.config, "window", None)


class Reader:
    """A model that reads, and is asked at any place of what it read; it counts what that takes.

    reader = Reader(model, tokenizer)
    document = reader.read(tokenizer.encode(text, begin=tokenizer.begins))
    for question in questions:
        asked = reader.read(tokenizer.encode(question), document)
        scores = reader.score(asked, [tokenizer.encode(answer) for answer in answers])
        [answer] = reader.write([asked], max_tokens=100, stop=("\\n",))

    Args:
        model: in evaluation mode.
        tokenizer: that of the model.
        precision: of the matrix products; see DecodingEngine.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, precision: Precision = "auto"):
        self.model, self.tokenizer = model, tokenizer
        self.work = Work()
        self._generator = Generator(model, tokenizer, precision)

    def read(self, tokens: np.ndarray, after: Context | None = None) -> Context:
        """Read on in a fork; what came before stays as it is.

        Args:
            tokens: (L,) int64; those of a text after the begin token, where the tokenizer `begins` texts.
            after: what was read before; None for nothing.

        Raises:
            InputError: a token outside the vocabulary.
            Diverged: a loss that is not finite.
        """
        context = Context(self.model, self._generator.precision) if after is None else after.fork()
        before = context.position - context.waiting
        for begin in range(0, len(tokens), BLOCK_TOKENS):
            context.read(tokens[begin : begin + BLOCK_TOKENS])
        self.work.computed += context.position - context.waiting - before
        return context

    def each(self, texts: Sequence[np.ndarray], after: Context | None = None) -> Iterator[tuple[int, Context]]:
        """Read texts, and once what several of them begin with.

        Args:
            texts: (L,) int64 each; see `read`.
            after: what was read before each of them; None for nothing.

        Yields:
            The number of a text, and the context that has read all of it; in an order that keeps few states at a time.
        """
        order = reading_order(texts)
        common = [_common(texts[a], texts[b]) for a, b in pairwise(order)]
        trunks: list[tuple[int, Context | None]] = [(0, after)]  # each read so far, the beginning of the next
        for place, number in enumerate(order):
            while place and trunks[-1][0] > common[place - 1]:
                trunks.pop()
            begun, trunk = trunks[-1]
            for fork in _forks(common[place:], begun):
                trunk = self.read(texts[number][begun:fork], trunk)
                trunks.append((fork, trunk))
                begun = fork
            yield number, self.read(texts[number][begun:], trunk)

    @torch.no_grad()
    def score(self, context: Context, continuations: Sequence[np.ndarray]) -> list[Score]:
        """Log-likelihoods of continuations, exact and all at once.

        Args:
            context: with something read; it stays as it is.
            continuations: (L,) int64 each, of one token or more.

        Raises:
            InputError: nothing was read.
            Diverged: a logit that is not finite.
        """
        assert all(len(c) for c in continuations)
        logits, state = context.finish()
        rows, longest = len(continuations), max(map(len, continuations), default=0)
        tokens = _rows(continuations)
        self._count([context] * rows, [len(c) for c in continuations], context.waiting, rows * (longest - 1))
        losses, likeliest = _judged(logits.expand(rows, -1)[:, None], tokens[:, :1])
        piece = max(1, min(MAX_PIECE_LENGTH, BLOCK_LOGITS // max(1, rows * logits.shape[-1])))
        state = state.select([0] * rows)
        for begin in range(0, longest - 1, piece):
            end = min(begin + piece, longest - 1)
            with autocast(context.precision, context.device):
                logits, state = self.model(tokens[:, begin:end].to(context.device), state)
            more = _judged(logits, tokens[:, begin + 1 : end + 1])
            losses, likeliest = (torch.cat(pair, 1) for pair in zip((losses, likeliest), more, strict=True))
        return [
            Score(-losses[row, : len(c)].sum().item(), bool(likeliest[row, : len(c)].all()))
            for row, c in enumerate(continuations)
        ]

    def write(
        self,
        contexts: Sequence[Context],
        max_tokens: int,
        stop: Sequence[str] = (),
        how: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """Texts until a stop string, an end as in training, or so many tokens.

        Args:
            contexts: each with something read; they stay as they are.
            max_tokens: of each answer.
            stop: before any of these strings it ends.
            how: tokens are chosen; the likeliest each time, by default.
            seeds: of what is drawn, one a text; by default that of `how` for each.

        Raises:
            InputError: nothing was read, or logits that are not finite.
        """
        assert max_tokens > 0
        sampling = replace(how, max_tokens=max_tokens, stop=tuple(stop))
        texts = [""] * len(contexts)
        for first in range(0, len(contexts), ROWS):
            together = [context.fork() for context in contexts[first : first + ROWS]]
            lengths = [0] * len(together)
            own = None if seeds is None else seeds[first : first + ROWS]
            for delta in self._generator.stream(together, sampling, own, grow=False):
                texts[first + delta.row] += delta.text
                lengths[delta.row] += 1
            steps = len(together) * (max(lengths, default=1) - 1)
            self._count(together, lengths, sum(context.waiting for context in together), steps)
        return texts

    def _count(self, contexts: Sequence[Context], lengths: Sequence[int], finished: int, steps: int) -> None:
        """What was computed for continuations, of which nobody reads the last token."""
        self.work.computed += finished + steps
        self.work.anew += sum(c.position + n - 1 for c, n in zip(contexts, lengths, strict=True))


def reading_order(texts: Sequence[np.ndarray]) -> list[int]:
    """The numbers of texts by their tokens, so that those with a beginning in common follow each other."""
    keys = [text.astype(">u4").tobytes() for text in texts]
    return sorted(range(len(texts)), key=keys.__getitem__)


def _forks(common: Sequence[int], beyond: int) -> list[int]:
    """Where later texts part from the one at hand, in ascending order.

    Args:
        common: with how many tokens each later text begins as the one before it does.
        beyond: what has no interest, since it was read.
    """
    found: list[int] = []
    for length in common:
        if length <= beyond:
            break
        if not found or length < found[-1]:
            found.append(length)
    return found[::-1]


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens with which both begin."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter


def _rows(continuations: Sequence[np.ndarray]) -> Tensor:
    """As (rows, longest) int64; shorter rows end in zeros, which nothing depends on."""
    longest = max(map(len, continuations), default=0)
    tokens = np.zeros((len(continuations), longest), np.int64)
    for row, continuation in enumerate(continuations):
        tokens[row, : len(continuation)] = continuation
    return torch.from_numpy(tokens)


def _judged(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each target in nats, (rows, L) float64, and whether it is the likeliest, both on the CPU."""
    targets = targets.to(logits.device)
    losses = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0].cpu()
    if not bool(losses.isfinite().all()):
        raise Diverged("the model's logits are not finite: its weights hold NaN or infinity; try another checkpoint")
    return losses, (logits.argmax(-1) == targets).cpu()
