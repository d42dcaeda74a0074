"""The model class of lm-evaluation-harness over any LanguageModel: exact, without a limit of length, read once.

What requests begin with in common, such as solved examples, is read once, and the answers to one question go on from
one reading of it; see read_once.py. transformers is not needed.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM

from ..data.chat import ANSWERS, TEMPLATE, ChatTemplate, Message
from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..generation.context import Context
from ..generation.sampling import Sampling
from ..model.language_model import LanguageModel
from ..training.precision import Precision
from .read_once import Reader, window_of

TOGETHER = 32  # continuations of one context that are scored at once
WRITTEN_TOGETHER = 8  # texts
MOST_WRITTEN = 256  # tokens, where a task says nothing
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = ("until", *_LENGTHS, "do_sample", "temperature", "top_p", "top_k", "min_p")
_UNCHANGING = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
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
        begin: whether the begin token stands before every text; None for as in training.
        watch: called with the number of requests that are done, and of all, of one call.
        seed: of texts that are drawn at random. What is drawn depends on it, on the prompt, and on how often that came
            before in one call, and on nothing else.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        precision: Precision = "auto",
        begin: bool | None = None,
        watch: Callable[[int, int], None] = lambda done, total: None,
        seed: int = 0,
    ):
        super().__init__()
        self.reader = Reader(model, tokenizer, precision)
        self.cut = Cut()
        self._window = window_of(model)
        self._tokenizer, self._watch, self._seed = tokenizer, watch, seed
        self._begin = tokenizer.begins if begin is None else begin
        self._own_chats = tokenizer if isinstance(tokenizer, ChatTemplate) else None

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
        """Identifies the tokenizer and its form of chats."""
        if self._own_chats is None:
            return self._tokenizer.fingerprint
        form = self._own_chats.chat_template().encode()
        return f"{self._tokenizer.fingerprint}-{hashlib.sha256(form).hexdigest()[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, with the begin token before it unless `add_special_tokens` is False.

        Of a model of another program, special tokens that the text spells are such tokens, as in the harness's own
        class: its chats are written so.
        """
        begin = self._begin and add_special_tokens is not False
        if self._own_chats is not None:
            whole: list[int] = self._own_chats.encode_chat_text(string).tolist()
            return [self._tokenizer.begin] * (begin and whole[:1] != [self._tokenizer.begin]) + whole
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

        Raises:
            InputError: a model of another program that has no form of chats.
        """
        if self._own_chats is not None:
            messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
            return self._own_chats.chat_text(messages, add_generation_prompt)
        turns = [f"{turn['role']}\n{turn['content'].replace(_END, '')}" for turn in chat_history]
        return _END.join([*turns, f"{ANSWERS}\n"] if add_generation_prompt else turns)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The form of chats, in Jinja, or nothing where none is asked for."""
        if not chat_template:
            return None
        return TEMPLATE if self._own_chats is None else self._own_chats.chat_template()

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
        """See LM.generate_until: the likeliest token each time, or drawn at random where a task says so.

        Raises:
            InputError: a setting of writing that is not known here, or out of its range.
        """
        found = [""] * len(requests)
        wanted: dict[Sampling, list[int]] = {}
        earlier: Counter[str] = Counter()
        seeds = []
        for number, request in enumerate(requests):
            prompt, given = request.args
            wanted.setdefault(_sampling(given), []).append(number)
            seeds.append(_seed_of(self._seed, earlier[prompt], prompt))
            earlier[prompt] += 1
        done = 0
        for sampling, asked in wanted.items():
            prompts = [self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in asked]
            contexts = self._read([self._fitted(prompt, sampling.max_tokens) for prompt in prompts])
            pairs = ((asked[place], context) for places, context in contexts for place in places)
            for together in _parts(pairs, WRITTEN_TOGETHER):
                begun = [context for _, context in together]
                own = [seeds[number] for number, _ in together]
                texts = self.reader.write(begun, sampling.max_tokens, sampling.stop, sampling, own)
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


def _sampling(given: dict[str, Any]) -> Sampling:
    """How a request wants its text written.

    Raises:
        InputError: a setting that is not known here and would change the text, or one out of its range.
    """
    given = {name: value for name, value in given.items() if value is not None}
    unknown = {n: v for n, v in given.items() if n not in _KNOWN and _UNCHANGING.get(n) != v}
    if unknown:
        raise InputError(f"a task wants its texts written with {unknown}; known here are {', '.join(_KNOWN)}")
    most = next((int(given[name]) for name in _LENGTHS if name in given), MOST_WRITTEN)
    if most < 1:
        raise InputError(f"a task wants {most} tokens written; it must be at least 1")
    until = given.get("until", [])
    stop = tuple(filter(None, [until] if isinstance(until, str) else until))
    drawn = given.get("do_sample", float(given.get("temperature", 0)) > 0)
    greedy = Sampling(max_tokens=most, temperature=0, stop=stop)
    if not drawn:
        return greedy
    return replace(
        greedy,
        temperature=float(given.get("temperature", 1)),
        top_k=max(0, int(given.get("top_k", 0))),  # -1 stands for all, as 0 does
        top_p=float(given.get("top_p", 1)),
        min_p=float(given.get("min_p", 0)),
    )


def _seed_of(seed: int, earlier: int, prompt: str) -> int:
    """A seed for one request, whatever others there are."""
    said = hashlib.sha256(f"{seed} {earlier} {prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(said[:8], "big")


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
