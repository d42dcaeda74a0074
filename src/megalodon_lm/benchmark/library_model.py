"""A model of transformers as a contender, at the settings that are fastest here."""

import copy
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from ..config import ModelConfig
from ..pairs import Timer, least
from ..training.precision import autocast
from .measures import CPU, STEPS, Measure, Numbers, random_tokens, timed
from .peers import peer

TRIAL_STEPS = 4


class LibraryModel:
    """A model of transformers of equal parameters, with the weights and the cache that are fastest here."""

    def __init__(self, name: str, config: ModelConfig, precision: Numbers):
        self.module, self.precision, self.vocabulary = peer(name), precision, config.vocab_size
        torch.manual_seed(0)
        self.model = self.module.build(config.num_parameters, config.vocab_size)
        self._cast: nn.Module | None = None
        self.weights: Literal["autocast", "bf16", "float32"] = "float32"
        self.cache = self.module.CACHES[0]

    def settle(self, measure: Measure, batch: int, length: int) -> str:
        """See Contender. A few runs of each choice decide: of a short prompt, or of steps at the full context."""
        parameters = f"{sum(p.numel() for p in self.model.parameters()):,} parameters"
        if measure == "training":
            self.weights = "autocast" if self.precision == "bf16" else "float32"
            self._training(batch, min(length, 64))()
            return f"{parameters}, {self.precision}"
        if measure == "prefill":
            choices = [(weights, self.cache) for weights in self._weights()]
        else:
            choices = [(weights, cache) for weights in self._weights() for cache in self.module.CACHES]
        seconds = {choice: self._try(measure, length, *choice) for choice in choices}
        self.weights, self.cache = min(seconds, key=lambda choice: seconds[choice])
        return f"{parameters}, {self.weights}" + (f", {self.cache} cache" if measure == "decode" else "")

    def timer(self, measure: Measure, batch: int, length: int) -> Timer:
        """See Contender."""
        if measure == "training":
            return timed(self._training(batch, length))
        if measure == "prefill":
            return timed(self._prefill(batch, length))
        return self._decode(length, STEPS)

    def _weights(self) -> tuple[Literal["autocast", "bf16", "float32"], ...]:
        return ("autocast", "bf16", "float32") if self.precision == "bf16" else ("float32",)

    def _try(self, measure: Measure, length: int, weights: Any, cache: str) -> float:
        self.weights, self.cache = weights, cache
        try:
            if measure == "decode":
                timer = self._decode(length, TRIAL_STEPS)
            else:
                timer = timed(self._prefill(1, min(length, 512)))
            return least([timer])[0]
        except RuntimeError:  # no static cache takes what autocast computes, no scan of mambapy takes bf16 weights
            return float("inf")

    def _evaluated(self) -> nn.Module:
        if self.weights != "bf16":
            return self.model.eval()
        if self._cast is None:
            self._cast = copy.deepcopy(self.model).to(torch.bfloat16)
        return self._cast.eval()

    def _precision(self) -> Any:
        return autocast("bf16" if self.weights == "autocast" else "float32", CPU)

    def _training(self, batch: int, length: int) -> Callable[[], None]:
        model = self.model.train()
        tokens = random_tokens(batch, length, self.vocabulary)

        def step() -> None:
            with self._precision():
                loss = self.module.loss(model, tokens)
            loss.backward()
            model.zero_grad(set_to_none=True)

        return step

    def _prefill(self, batch: int, length: int) -> Callable[[], None]:
        model, tokens = self._evaluated(), random_tokens(batch, length, self.vocabulary)

        def run() -> None:
            with torch.inference_mode(), self._precision():
                self.module.prefill(model, tokens)

        return run

    def _decode(self, length: int, steps: int) -> Timer:
        model = self._evaluated()
        with torch.inference_mode(), self._precision():
            dtype = torch.float32 if self.weights == "float32" else torch.bfloat16
            cache = self.module.made_up_cache(model, self.cache, length, steps, dtype)

        def timer() -> float:
            nonlocal cache
            token = torch.zeros(1, 1, dtype=torch.int64)
            with torch.inference_mode(), self._precision():
                began = time.perf_counter()
                for _ in range(steps):
                    logits, cache = self.module.step(model, token, cache)
                    token = logits.argmax(-1, keepdim=True)
                seconds = time.perf_counter() - began
                self.module.rewind(cache, steps)
            return seconds

        return timer
