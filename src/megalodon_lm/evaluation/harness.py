"""The model class of lm-evaluation-harness over any LanguageModel: exact, without a limit of length, read once.

What requests begin with in common, such as solved examples, is read once, and the answers to one question go on from
one reading of it; see read_once.py. transformers is not needed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM

from ..data.chat import ANSWERS
from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..generation.context import Context
from ..model.language_model import LanguageModel
from ..training.precision import Precision
from .read_once import Reader, window_of

TOGETHER = 32  # continuations of one context that are scored at once
WRITTEN_TOGETHER = 8  # texts
MOST_WRITTEN = 256  # tokens, where a task says nothing
_END = "\ue0e0"  # stands for the end token in a chat, which no text can spell; a private character of Unicode


@dataclass
class Cut:
    """What a model with a window was not given of what it was asked."""

    requests: int = 0
    tokens: int = 0


class HarnessModel(TemplateLM):
    """A LanguageModel as the harness calls it.

    Args:
        model: in evaluation mode.
        tokenizer: that of the model.
        precision: of matrix products.
        begin: whether the begin token stands before every text, as in training.
        watch: called with the number of requests that are done, and of all, of one call.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        precision: Precision = "auto",
        begin: bool = True,
        watch: Callable[[int, int], None] = lambda done, total: None,
    ):
        super().__init__()
        self.reader = Reader(model, tokenizer, precision)
        self.cut = Cut()
        self._window = window_of(model)
        self._tokenizer, self._begin, self._watch = tokenizer, begin, watch

    @property
    def eot_token_id(self) -> int:
        """The token that ends a message."""
        return self._tokenizer.end

    @property
    def prefix_token_id(self) -> int:
        """What a continuation without a context stands behind."""
        return self._tokenizer.begin

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer."""
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, with the begin token before it unless `add_special_tokens` is False."""
        begin = self._begin and add_special_tokens is not False
        first, *more = string.split(_END)
        tokens = self._tokenizer.encode(first, begin).tolist()
        for part in more:
            tokens += [self._tokenizer.end, *self._tokenizer.encode(part).tolist()]
        return tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as models of chats are trained on it, which ends where the answer begins, or goes on.

        Args:
            chat_history: messages with `role` and `content`.
            add_generation_prompt: open an answer; otherwise the last message stays open.
        """
        turns = [f"{turn['role']}\n{turn['content'].replace(_END, '')}" for turn in chat_history]
        return _END.join([*turns, f"{ANSWERS}\n"] if add_generation_prompt else turns)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See LM.loglikelihood; progress goes to `watch`."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        done = 0
        for numbers, context in self._read([self._fitted(before, len(behind) - 1) for _, before, behind in requests]):
            for together in _parts(numbers, TOGETHER):
                continuations = [np.array(requests[n][2], np.int64) for n in together]
                for number, score in zip(together, self.reader.score(context, continuations), strict=True):
                    found[number] = score.log_likelihood, score.greedy
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
            done += len(numbers)
            self._watch(done, len(requests))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """See LM.loglikelihood_rolling; every token with all that came before it, in constant memory."""
        found = []
        for done, request in enumerate(requests, 1):
            (text,) = request.args
            found.append(self._rolling(self.tok_encode(text, add_special_tokens=False)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
            self._watch(done, len(requests))
        return found

    def _rolling(self, tokens: list[int]) -> float:
        """Log-likelihood of a text; by windows, each behind the last token of the one before, where there is one."""
        whole = np.array([self.prefix_token_id, *tokens], np.int64)
        if self._window is not None and len(tokens) > self._window:
            self.cut.requests += 1
            self.cut.tokens += len(tokens) - self._window
            places = range(0, len(tokens), self._window)
            contexts = [self.reader.read(whole[at : at + 1]) for at in places]
            behind = [whole[at + 1 : at + 1 + self._window] for at in places]
            return sum(self.reader.score(c, [b])[0].log_likelihood for c, b in zip(contexts, behind, strict=True))
        context = self.reader.read(whole)
        self.reader.work.computed += context.waiting - 1
        self.reader.work.anew += len(tokens)
        return -(context.loss() or 0.0) * len(tokens)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """See LM.generate_until: the likeliest token each time.

        Raises:
            InputError: a task that wants tokens drawn at random.
        """
        found = [""] * len(requests)
        wanted: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, request in enumerate(requests):
            wanted.setdefault(_settings(request.args[1]), []).append(number)
        done = 0
        for (stop, most), asked in wanted.items():
            prompts = [self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in asked]
            contexts = self._read([self._fitted(prompt, most) for prompt in prompts])
            pairs = ((asked[place], context) for places, context in contexts for place in places)
            for together in _parts(pairs, WRITTEN_TOGETHER):
                texts = self.reader.write([context for _, context in together], most, stop)
                for (number, _), text in zip(together, texts, strict=True):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                done += len(together)
                self._watch(done, len(requests))
        return found

    def _read(self, texts: Sequence[list[int]]) -> Iterator[tuple[list[int], Context]]:
        """Read texts: the numbers of those that are one and the same, and what was read."""
        numbers: dict[bytes, list[int]] = {}
        arrays = [np.array(text, np.int64) for text in texts]
        for number, array in enumerate(arrays):
            numbers.setdefault(array.tobytes(), []).append(number)
        distinct = list(numbers.values())
        for which, context in self.reader.each([arrays[same[0]] for same in distinct]):
            yield distinct[which], context

    def _fitted(self, context: list[int], room: int) -> list[int]:
        """A context, or its end, that leaves room for so many tokens in the model's window, if it has one.

        Raises:
            InputError: not one token of it has room.
        """
        over = 0 if self._window is None else max(0, len(context) + room - self._window)
        if over >= len(context):
            raise InputError(f"a window of {self._window:,} tokens has no room for {room:,} behind a context")
        self.cut.requests += over > 0
        self.cut.tokens += over
        return context[over:]


def _settings(given: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stop strings, and the most tokens to write."""
    if given.get("do_sample") and float(given.get("temperature", 1.0)) > 0:
        raise InputError(f"a task draws tokens at random ({given}); only the likeliest ones are written here")
    until = given.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    most = next((int(given[name]) for name in names if given.get(name) is not None), MOST_WRITTEN)
    return tuple(filter(None, [until] if isinstance(until, str) else until)), most


def _parts(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Items in lists of a size."""
    found: list[Any] = []
    for item in items:
        found.append(item)
        if len(found) == size:
            yield found
            found = []
    if found:
        yield found
