"""Generator: read text of any length from any source, then write on from it, for many texts at once."""

import codecs
import math
import sys
from collections.abc import Callable, Sequence
from collections.abc import Generator as PythonGenerator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.corpus import Source, Texts, texts_of
from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..model.language_model import LanguageModel
from ..state import State
from ..training.precision import Precision
from .context import Context
from .engine import DecodingEngine
from .sampling import Draws, Sampling, sample


class Delta(NamedTuple):
    """What one token adds to one row."""

    row: int
    token: int
    text: str
    """What can be shown now: whole characters, and nothing that may yet turn out to be a stop string."""
    finish_reason: Literal["", "length", "stop", "end"]
    """Why the row ends here: max_tokens, a stop string, an end as the model was trained with; or empty."""
    logprob: float | None = None
    """Where asked for: log-probability of the token by the model, in nats, before temperature and limits."""


class Generator:
    """Reading and writing with one model.

    generator = Generator(model, ByteTokenizer())
    book = generator.read(Path("book.txt"))          # any length, constant memory
    print(generator.write([book.fork()], Sampling(max_tokens=200))[0])

    Args:
        model: in evaluation mode.
        tokenizer: that of the model.
        precision: of matrix products; see DecodingEngine.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, precision: Precision = "auto"):
        self.model, self.tokenizer, self.precision = model, tokenizer, precision
        self._barred = torch.from_numpy(~tokenizer.writable(model.config.vocab_size))

    def warm_up(self) -> None:
        """Do now what the first text would wait for: load the compiled kernels, round the weights; in any thread."""
        context = Context(self.model, self.precision)
        context.read(np.zeros(32, np.int64))
        logits, state = context.finish()
        DecodingEngine(self.model, state, self.precision).step(logits.argmax(-1))

    def context(self, bookmark: Path | None = None) -> Context:
        """What to read into: empty but for the begin token, where texts begin with it, or as a bookmark keeps it.

        Raises:
            InputError: the bookmark is missing, broken, or of another model or tokenizer.
        """
        if bookmark is not None:
            return Context.load(bookmark, self.model, self.tokenizer, self.precision)
        context = Context(self.model, self.precision)
        context.read(self.tokenizer.encode(b"", begin=self.tokenizer.begins))
        return context

    def read(
        self,
        source: Source | Texts,
        context: Context | None = None,
        watch: Callable[[Context], None] = lambda context: None,
    ) -> Context:
        """Read a text to its end, or several; each after the first comes after a begin token.

        Args:
            source: a string or bytes is the text itself; a Path, a binary file or an iterable of strings or bytes is
                read block by block; a Path or Texts may hold several texts.
            context: to read on from, in place; None for a new one.
            watch: called after every block.

        Raises:
            InputError: the source is missing or unreadable.
        """
        context = context or self.context()
        for number, text in enumerate(texts_of(source)):
            if number:
                context.read(self.tokenizer.encode(b"", begin=True))
            for tokens in self.tokenizer.encode_blocks(text):
                context.read(tokens)
                watch(context)
        if not context.position:  # nothing to go on from: the begin token, whether or not texts begin with it
            context.read(self.tokenizer.encode(b"", begin=True))
        return context

    def write(
        self,
        contexts: Sequence[Context | str],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        watch: Callable[[Delta], None] = lambda delta: None,
        fresh: bool = False,
    ) -> list[str]:
        """Continue texts to their ends; arguments as in `stream`.

        Returns:
            What was written to each.
        """
        texts = [""] * len(contexts)
        for delta in self.stream(contexts, sampling, seeds, fresh=fresh):
            texts[delta.row] += delta.text
            watch(delta)
        return texts

    def stream(
        self,
        contexts: Sequence[Context | str],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
        fresh: bool = False,
        grow: bool = True,
    ) -> PythonGenerator[Delta]:
        """Continue several texts side by side, token by token.

        What a row says depends on its own context and seed alone, not on its neighbours nor on how its text was cut.
        The contexts grow by what is written; fork them to keep what was. A row ends where a text ended in training: at
        the end token, and at the begin token, since the next document followed. Other special tokens are never drawn.

        Args:
            contexts: each with something read, or a text that is read first; they may differ in length.
            sampling: one for all rows.
            seeds: one a row; by default sampling.seed for each.
            logprobs: whether the deltas tell them.
            fresh: what is written is a text of its own, such as an answer, and not the rest of the one that was read.
            grow: False leaves the contexts as they are, for callers that need them no more.

        Yields:
            A Delta for each row in turn, until all rows are finished.
        """
        if sampling.max_tokens == 0 or not contexts:
            return
        if isinstance(contexts, str) or (seeds is not None and len(seeds) != len(contexts)):
            raise InputError("give contexts or texts as a list, and seeds, if any, one for each")
        grown = [self.read(text) if isinstance(text, str) else text for text in contexts]
        if len({id(context) for context in grown}) < len(grown):
            raise InputError("one context was given twice; give context.fork() for each continuation")
        read = [context.finish() for context in grown]
        logits = torch.cat([logits for logits, _ in read])
        engine = DecodingEngine(self.model, State.cat([state for _, state in read]), self.precision)
        rows = [_Row(self.tokenizer, sampling, None if fresh else context.last) for context in grown]
        draws = Draws(list(seeds) if seeds is not None else [sampling.seed] * len(rows))
        written = torch.zeros(logits.shape, dtype=torch.bool)
        try:
            while True:
                allowed = logits.masked_fill(self._barred.to(logits.device), -math.inf)
                tokens = sample(allowed, sampling, draws.next(), written)
                written[torch.arange(len(rows)), tokens] = True
                scores = _logprobs(logits, tokens) if logprobs else [None] * len(rows)
                for number, (row, token, score) in enumerate(zip(rows, tokens.tolist(), scores, strict=True)):
                    if not row.finish_reason:
                        yield Delta(number, token, row.add(token), row.finish_reason, score)
                if all(row.finish_reason for row in rows):
                    return
                logits = engine.step(tokens.to(engine.device))
        finally:
            if grow and not sys.is_finalizing():  # a stream left open at the interpreter's exit: PyTorch may be gone
                for context, row in zip(grown, rows, strict=True):
                    context.read(np.array(row.tokens, np.int64))


def _logprobs(logits: Tensor, tokens: Tensor) -> list[float]:
    """Of the token of each row."""
    scores = logits.double().cpu().log_softmax(-1)
    return scores[torch.arange(len(tokens)), tokens.cpu()].tolist()


class _Row:
    """What was written to one row, and whether it goes on."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, after: int | None):
        self.ends, self.sampling = tokenizer.ends, sampling
        self.tokens: list[int] = []
        self.finish_reason: Literal["", "length", "stop", "end"] = ""
        self._bytes = tokenizer.decoder(after)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, token: int) -> str:
        """Take a token; the text that can be shown now."""
        if token in self.ends:
            self.finish_reason = "end"
            return self._held + self._decode.decode(b"", True)
        self.tokens.append(token)
        last = len(self.tokens) == self.sampling.max_tokens
        text = self._held + self._decode.decode(self._bytes(token), last)
        found = [at for at in (text.find(stop) for stop in self.sampling.stop) if at >= 0]
        if found:
            self.finish_reason = "stop"
            return text[: min(found)]
        if last:
            self.finish_reason = "length"
            return text
        held = max((_overlap(text, stop) for stop in self.sampling.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
