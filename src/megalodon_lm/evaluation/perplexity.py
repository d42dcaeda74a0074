"""Loss against context: how well a model predicts a text when it may look back 64 tokens, 1,024, or to its start."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..data.tokenizer import Tokenizer
from ..generation.scoring import token_losses
from ..model.language_model import LanguageModel
from ..training.precision import Precision
from .norm_statistics import NormSchedule, WindowedStatistics

BATCH_TOKENS = 8192
LOG2 = math.log(2)
_LARGEST_LOG = math.log(sys.float_info.max)


class Losses:
    """Losses of a text, summed by position in its windows, in buckets that end at powers of two: constant in size."""

    def __init__(self) -> None:
        self._nats = np.zeros(64)
        self._counts = np.zeros(64, np.int64)
        self.longest = 0
        """Tokens of the longest window."""
        self.num_bytes = 0
        """Of the text, if score_texts read it."""

    def add(self, position: int, losses: np.ndarray) -> None:
        """Count some losses in.

        Args:
            position: of the first column in its windows.
            losses: (windows, columns) in nats.
        """
        end = position + losses.shape[1]
        self.longest = max(self.longest, end)
        low = position
        while low < end:
            bucket = low.bit_length()  # positions 0; 1; 2, 3; 4 to 7; ...
            high = min(1 << bucket, end)
            part = losses[:, low - position : high - position]
            self._nats[bucket] += part.sum()
            self._counts[bucket] += part.size
            low = high

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return int(self._counts.sum())

    @property
    def nats(self) -> float:
        """Sum of their losses."""
        return float(self._nats.sum())

    @property
    def mean(self) -> float:
        """Loss of a token in nats; NaN of none."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """Of a token; infinite beyond the largest number."""
        return math.exp(self.mean) if self.mean < _LARGEST_LOG else math.inf

    def bits_per_byte(self, num_bytes: int) -> float:
        """Over a text of so many bytes."""
        return self.nats / LOG2 / num_bytes

    def by_position(self) -> dict[int, float]:
        """Mean loss in bits by position in the window: {last position of the bucket, counted from 1: bits a token}."""
        return {
            min(1 << bucket, self.longest): float(self._nats[bucket] / count / LOG2)
            for bucket, count in enumerate(self._counts.tolist())
            if count
        }


@torch.inference_mode()
def score(
    model: LanguageModel,
    blocks: Iterable[np.ndarray],
    begin: int,
    context: int | None = None,
    precision: Precision = "float32",
    schedule: NormSchedule | None = None,
    watch: Callable[[Losses], None] = lambda losses: None,
    keep: Callable[[np.ndarray], None] = lambda nats: None,
    losses: Losses | None = None,
) -> Losses:
    """Losses of every token of one document of any length, in constant memory.

    The document is cut into windows of `context` tokens. Each is read from an empty state behind a begin token, so that
    the t-th token of a window is predicted from t tokens of context.

    Args:
        model: the model; its dropout is switched off.
        blocks: the document, int64 tokens in blocks of any lengths.
        begin: the begin token.
        context: tokens in a window; None for one window over everything.
        precision: of the matrix products.
        schedule: normalise with statistics of the last chunks, see norm_statistics; None with those of all.
        watch: called now and then with the losses so far.
        keep: called with the losses of each piece in nats, (windows, columns) float64; without
            `schedule` in the order of the text.
        losses: to add to; None for new ones.

    Raises:
        Diverged: a loss is not finite.
    """
    model.eval()
    losses, state = losses or Losses(), None
    norms = WindowedStatistics(model, schedule, precision) if schedule is not None else None
    for position, before, tokens in _pieces(blocks, context, norms.unit if norms else BATCH_TOKENS, begin):
        inputs = torch.cat([before, tokens[:, :-1]], 1)
        nats, state = token_losses(model, inputs, tokens, state if position else None, precision)
        if norms:
            state = norms.after(inputs, state)
        losses.add(position, nats.numpy())
        keep(nats.numpy())
        watch(losses)
    return losses


def score_texts(
    model: LanguageModel,
    texts: Iterable[Iterable[bytes]],
    tokenizer: Tokenizer,
    context: int | None = None,
    precision: Precision = "float32",
    schedule: NormSchedule | None = None,
    watch: Callable[[Losses], None] = lambda losses: None,
) -> Losses:
    """Losses of several documents, each by itself; its bytes are counted too. Arguments as for score.

    Args:
        texts: documents in blocks of UTF-8.
        tokenizer: of the model.
    """
    losses = Losses()

    def counted(text: Iterable[bytes]) -> Iterator[bytes]:
        for block in text:
            losses.num_bytes += len(block)
            yield block

    for text in texts:
        tokens = tokenizer.encode_blocks(counted(text))
        score(model, tokens, tokenizer.begin, context, precision, schedule, watch, losses=losses)
    return losses


def _pieces(
    blocks: Iterable[np.ndarray], context: int | None, unit: int, begin: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Cut a document into windows, short ones side by side, and those into pieces that end at each multiple of `unit`.

    Yields:
        Position of the piece in its windows, the token before it in each (windows, 1), and its tokens (windows, piece).
    """
    document = _Document(blocks)
    while context is None or context > BATCH_TOKENS:
        position, before = 0, torch.tensor([[begin]])
        while context is None or position < context:
            left = BATCH_TOKENS if context is None else context - position
            tokens = document.take(min(unit - position % unit, BATCH_TOKENS, left))[None]
            if not tokens.numel():
                return
            yield position, before, tokens
            position, before = position + tokens.shape[1], tokens[:, -1:]
    while len(taken := document.take(BATCH_TOKENS // context * context)):
        whole = len(taken) // context * context
        for windows in (taken[:whole].view(-1, context), taken[whole:][None]):
            before = torch.full((len(windows), 1), begin)
            for position in range(0, windows.shape[1] if windows.numel() else 0, unit):
                tokens = windows[:, position : position + unit]
                yield position, before, tokens
                before = tokens[:, -1:]


class _Document:
    """Tokens in blocks, taken in other lengths."""

    def __init__(self, blocks: Iterable[np.ndarray]):
        self._blocks = iter(blocks)
        self._rest = torch.zeros(0, dtype=torch.int64)

    def take(self, length: int) -> Tensor:
        """So many tokens, or fewer at the end."""
        parts, found = [self._rest], len(self._rest)
        while found < length and (block := next(self._blocks, None)) is not None:
            parts.append(torch.from_numpy(block))
            found += len(block)
        joined = torch.cat(parts)
        self._rest = joined[length:].clone()
        return joined[:length]
